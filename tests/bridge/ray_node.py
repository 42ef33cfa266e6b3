"""One more machine of a local Ray cluster, on loopback; it leaves when this process is killed.

python ray_node.py GCS_ADDRESS TEMPORARY_FOLDER CPUS
"""

import signal
import sys

from ray._private import ray_constants
from ray._private.node import Node
from ray._private.parameter import RayParams

ray_constants.ENABLE_RAY_CLUSTER = False  # Else Ray takes the address of another interface.
address, folder, cpus = sys.argv[1:]
node = Node(
    RayParams(
        gcs_address=address,
        redis_address=address,
        node_ip_address="127.0.0.1",
        num_cpus=int(cpus),
        num_gpus=0,
        object_store_memory=80 << 20,
        include_log_monitor=False,
        node_manager_port=0,
        dashboard_agent_listen_port=None,
        temp_dir=folder,
    ),
    head=False,
    shutdown_at_exit=False,
    spawn_reaper=True,  # Its processes die with this one.
)
print("joined", flush=True)
signal.pause()
