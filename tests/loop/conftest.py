"""Small worlds whose stores are closed, and a finished small run of the main job."""

import pytest
from main_job import ROOT, SMALL, run
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


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """One world for all tests of a file: its samplers are compiled once."""
    world = World(tmp_path_factory.mktemp("world"))
    yield world
    world.store.close()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished small run: its workdir, its flags, and what it printed."""
    workdir = tmp_path_factory.mktemp("run")
    flags = (f"--flagfile={ROOT / 'grpo.flags'}", f"--workdir={workdir}", *SMALL)
    first = run("train", *flags)
    assert first.returncode == 0, first.stdout + first.stderr
    return workdir, flags, first.stdout
