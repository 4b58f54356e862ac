"""A frame beside its own matrix products: the products are all of them, and a wrong frame gets no time."""

import pytest
import torch
import torch.nn.functional as F

from bench import bench_cpu_frame as bench

SMALL = {"depth": 3, "img_size": 32}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_row(dtype):
    row = bench.measure("tiny", dtype, 3, SMALL)
    # patches and head; in_proj and out_proj of each layer; x_proj and dt_proj of each direction
    spatial = bench.create("tiny", **SMALL).config.spatial_layers
    assert row["products"] == 2 + 3 * 2 + 2 * (3 + spatial)
    assert row["ratio"] > 0 and row["interval"][0] <= row["ratio"] <= row["interval"][1] and row["gemms_ms"] > 0


def test_a_product_that_is_not_recorded_is_noticed(monkeypatch):
    """As if the model called something else for one of its products."""
    linear = F.linear

    def fewer(model, x, record=bench.products_of):
        products, flops = record(model, x)
        return products[:-1], flops - 1

    monkeypatch.setattr(bench, "products_of", fewer)
    with pytest.raises(AssertionError, match="FLOPs recorded, the architecture has"):
        bench.measure("tiny", "fp32", 1, SMALL)
    assert F.linear is linear


def test_a_wrong_frame_gets_no_time(monkeypatch):
    create = bench.create

    def wrong(name, **options):
        model = create(name, **options)
        if "backend" not in options:
            model.norm_f.forward = lambda hidden, residual: (hidden * 1.001, residual)
        return model

    monkeypatch.setattr(bench, "create", wrong)
    with pytest.raises(AssertionError, match="a wrong result gets no time"):
        bench.measure("tiny", "fp32", 1, SMALL)


def test_products_run_alone_as_in_the_frame():
    model = bench.create("tiny", **SMALL, backend="reference")
    products, flops = bench.products_of(model, torch.randn(1, 3, 1, 32, 32))
    assert flops == bench.expected_flops(model) and all(product().isfinite().all() for product in products)
