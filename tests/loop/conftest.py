"""Makes small worlds and closes their stores."""

import pytest
from small_world import World


@pytest.fixture
def make_world(tmp_path):
    worlds = []

    def make(**options):
        worlds.append(World(tmp_path, **options))
        return worlds[-1]

    yield make
    for world in worlds:
        world.store.close()
