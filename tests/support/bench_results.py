"""Made-up results files: providers, cases and whole files."""

from phi1.bench.report import results


def entry(provider, ms, ratio=None, status="ok", **more):
    found = {"provider": provider, "version": "1", "status": status}
    if status == "ok":
        found |= {"ms": [ms, 0.98 * ms, 1.03 * ms], "roof_share": 0.5, "error": 1e-3}
    if ratio:
        found["ratio"] = [ratio, 0.99 * ratio, 1.02 * ratio]
    return found | more


def record(case="layer_norm N=16384 D=2048 float16 forward", ms=0.05, bound="memory", **fields):
    return {"case": case, "op": "layer_norm", "unit": "kernel", "direction": "forward", "shape": {"N": 16384},
            "dtype": "float16", "bytes": 134225920, "flops": 268435456, "readme": True, "input_copies": 2,
            "roof": {"gb_per_s": 3000.0, "tflop_per_s": 700.0, "ms": 0.0447, "bound": bound},
            "providers": [entry("phi1", ms, 1.0), entry("torch", 1.5 * ms, 1.5), entry("liger", 1.2 * ms, 1.2),
                          entry("quack", 0, status="not installed", reason="quack-kernels 0.6.5 is not installed")],
            } | fields


def content(*records, device="cuda", **facts):
    found = {"device": device, "gpu": "NVIDIA H100 80GB HBM3", "driver": "550.1", "cpu": "AMD EPYC", "cores": 2,
             "threads": 2, "torch": "2.11.0", "triton": "3.6.0", "commit": "abc1234"} | facts
    return {"format": results.FORMAT, "date": "2026-11-23", "environment": found, "settings": {},
            "cases": list(records)}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(results.as_text(value))
    return path
