"""Real verl actors that are killed in the middle of something, and the ones that start after them or beside them."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_actor import ON, run, same, start
from tiny_checkpoints import checkpoint

pytestmark = pytest.mark.real_verl
STEPS = ("--steps", "3")
KILLED = -9


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return checkpoint("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def eager(llama, tmp_path_factory):
    return run(tmp_path_factory.mktemp("eager") / "off.pt", llama, 1, None, *STEPS)


def caches(folder, **options):
    """npu_fuse's settings and the environment of a run that keeps proofs and kernels in `folder`."""
    return {**ON, "proof_cache": str(folder / "proofs"), **options}, {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")
    }


def test_the_others_end_when_a_rank_is_killed_in_a_step(llama, tmp_path):
    told = start(tmp_path / "out.pt", llama, 2, ON, "--die", "step")  # raises where one of them hangs
    assert told[1][1] == KILLED
    assert told[0][1] not in (0, KILLED)
    assert "gloo" in told[0][0].splitlines()[-1].lower() or "Connection closed by peer" in told[0][0], told[0][0][
        -2000:
    ]


def test_a_rank_killed_while_it_writes_a_proof_leaves_nothing_that_harms(llama, eager, tmp_path):
    fused, environment = caches(tmp_path)
    told = start(tmp_path / "out.pt", llama, 2, fused, *STEPS, "--die", "proof", environment=environment)
    assert told[1][1] == KILLED
    assert told[0][1] not in (0, KILLED)
    half = list((tmp_path / "proofs").glob(".proof-*"))
    assert half
    whole = sorted((tmp_path / "proofs").glob("*.json"))
    assert whole  # of the other rank
    whole[0].write_text(whole[0].read_text()[:20])  # as a disk without atomic renames may leave it
    again = run(tmp_path / "again.pt", llama, 1, fused, *STEPS, environment=environment)
    same(again, eager, "fp32")
    assert again["fused"] > 0
    for path in whole:
        json.loads(path.read_text())


def test_a_trainer_killed_while_it_compiles_leaves_nothing_that_harms(llama, eager, tmp_path):
    fused, environment = caches(tmp_path, handoff="inductor")
    [(told, code)] = start(tmp_path / "out.pt", llama, 1, fused, *STEPS, "--die", "compile", environment=environment)
    assert code == KILLED, told[-2000:]
    again = run(tmp_path / "again.pt", llama, 1, fused, *STEPS, environment=environment)
    same(again, eager, "fp32")


def test_two_trainers_share_caches_at_once(llama, eager, tmp_path):
    fused, environment = caches(tmp_path, handoff="inductor")

    def train(name):
        return run(tmp_path / f"{name}.pt", llama, 1, fused, *STEPS, environment=environment)

    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(train, ("one", "two")))
    for made in both:
        same(made, eager, "fp32")
        assert made["fused"] > 0
    kept = list((tmp_path / "proofs").iterdir())
    assert kept
    assert all(json.loads(path.read_text())["holds"] in (True, False) for path in kept)
