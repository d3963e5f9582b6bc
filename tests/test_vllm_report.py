"""What a vLLM worker tells after its warm-up, on as much of vLLM as it looks at."""

from __future__ import annotations

import json
import logging
import sys
import types
from types import SimpleNamespace

import pytest

from npu_fuse.integrations import vllm_report
from npu_fuse.report import GraphReport, SiteReport, Status, clear_reports, keep

CONFIG = SimpleNamespace(model_config=SimpleNamespace(model="some/Model 1"), compute_hash=lambda: "abc")
FUSED = SiteReport("rms_norm", Status.FUSED, "")
LEFT = SiteReport("swiglu", Status.MISSED, "a clamp")


def graph(*sites):
    return GraphReport(0, False, "reference", "vllm", 10, sites)


@pytest.fixture(autouse=True)
def vllm(monkeypatch, tmp_path, caplog):
    module = types.ModuleType("vllm")
    module.envs = SimpleNamespace(VLLM_CACHE_ROOT=str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "vllm", module)
    caplog.set_level(logging.INFO, "vllm.npu_fuse")


def test_all_graphs_of_a_worker_are_one_line_and_one_table(tmp_path, caplog):
    vllm_report.tell(CONFIG, 1, [graph(FUSED, FUSED), graph(FUSED, LEFT)], str(tmp_path / "report"))
    (record,) = caplog.records
    assert "rank 1 of some/Model 1: 2 graphs; fused 3 rms_norm; left 1 missed" in record.getMessage()
    table = json.loads((tmp_path / "report" / "npu_fuse_vllm_Model_1_rank1.json").read_text())
    assert table["totals"]["by_status"] == {"fused": 3, "missed": 1} and len(table["graphs"]) == 2


def test_graphs_from_a_cache_are_told_of_as_when_they_were_made(tmp_path, caplog):
    vllm_report.tell(CONFIG, 0, [graph(FUSED)], None)
    vllm_report.tell(CONFIG, 0, [], str(tmp_path / "report"))
    first, second = (record.getMessage() for record in caplog.records)
    assert second == f"{first} (graphs from vLLM's compile cache)"
    table = json.loads((tmp_path / "report" / "npu_fuse_vllm_Model_1_rank0.json").read_text())
    assert table["totals"]["fused"] == {"rms_norm": 1}


def test_a_silent_nothing_is_a_warning(caplog):
    vllm_report.tell(CONFIG, 0, [], None)
    vllm_report.tell(CONFIG, 2, [graph()], None)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2


def test_a_full_disk_stops_no_engine(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    vllm_report.tell(CONFIG, 0, [graph(FUSED)], str(tmp_path / "file" / "report"))
    assert "cannot be written" in caplog.records[-1].getMessage()


def test_each_worker_tells_of_its_own_graphs(monkeypatch, caplog):
    """Two engines in one process; the pass is in the configuration of the second only."""

    class Wrapper:
        def init_device(self):
            self.worker = SimpleNamespace(rank=0, vllm_config=self.config, compile_or_warm_up_model=self.warm_up)

        def warm_up(self):
            keep(graph(FUSED))
            return 7

    module = types.ModuleType("vllm.v1.worker.worker_base")
    module.WorkerWrapperBase = Wrapper
    for name in ("vllm.v1", "vllm.v1.worker"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.worker_base", module)
    fuse = SimpleNamespace(chosen=lambda: SimpleNamespace(report_dir=None))
    plain = SimpleNamespace(**{**vars(CONFIG), "plain": True})
    for _ in range(2):  # vLLM loads plugins several times
        vllm_report.watch(lambda config: None if config is plain else fuse)
    clear_reports()
    for config in (plain, CONFIG):
        wrapper = Wrapper()
        wrapper.config = config
        wrapper.init_device()
        assert wrapper.worker.compile_or_warm_up_model() == 7
    assert ["1 graphs; fused 1 rms_norm" in record.getMessage() for record in caplog.records] == [True]
    clear_reports()
