"""Flags of a mining run of the real entry point, small."""

SMALL = (
    "--num_queries=24 --num_eval=8 --bank_size=120 --pool_size=10 --warmup=none --proposals=24 "
    "--quotas=beam:6,sample:8,retrieval:2 --verify_best=4 --verify_low=3 --verify_uniform=3"
).split()
