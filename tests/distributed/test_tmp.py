from pathlib import Path
import pytest
from launches import ALONE, run_jobs, training_records

CASES = {
  1: {"alone": {}},
  2: {"tp2": dict(parallel__tensor_parallel_size=2, training__micro_batch_size=2), "cp2zero3": dict(parallel__context_parallel_size=2, parallel__zero_stage=3), "pp2recompute": dict(parallel__pipeline_parallel_size=2, parallel__recompute=True), "dp2g": dict(parallel__overlap_grad_reduce=True, parallel__distributed_optimizer=True, parallel__overlap_param_gather=True)},
  4: {"tp2pp2sp": dict(parallel__tensor_parallel_size=2, parallel__pipeline_parallel_size=2, parallel__sequence_parallel=True), "pp2vpp2": dict(parallel__pipeline_parallel_size=2, parallel__virtual_pipeline_size=2), "tp2cp2sp3": dict(parallel__tensor_parallel_size=2, parallel__context_parallel_size=2, parallel__sequence_parallel=True,parallel__zero_stage=3),"tp2bf16":dict(parallel__tensor_parallel_size=2, parallel__pipeline_parallel_size=2,precision="bf16")},
}
@pytest.mark.parametrize("head", ["tokens"])
def test_it(tmp_path, tiny, head):
    for ranks, cases in CASES.items():
        jobs = [("calm", tiny(tmp_path / n, "calm", **(ALONE | {"training__clip_grad_norm": 0.3, "training__schedule": "constant", "model__head__kind": head} | c))) for n, c in cases.items()]
        run_jobs(ranks, jobs, tmp_path)
        for n in cases:
            r, a = training_records(tmp_path / n), training_records(tmp_path / "alone")
            worst = max(abs(r[s][k] - a[s][k]) / max(1, abs(a[s][k])) for s in a for k in ("loss", "grad_norm"))
            print(n, "worst", worst, r[1]["loss"], r[20]["loss"])
