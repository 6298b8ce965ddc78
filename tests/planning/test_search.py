"""The search ranks what the trainer accepts and what fits; clusters and misfits are named."""

from dataclasses import replace

import pytest

from megachameleon.config import load_config
from megachameleon.planning.estimate import estimate, estimate_run
from megachameleon.planning.hardware import CLUSTERS, find_cluster
from megachameleon.planning.picture import write_picture
from megachameleon.planning.search import layouts, search
from megachameleon.planning.shapes import TransformerShape

H100 = CLUSTERS["h100"]
SMALL = replace(H100, memory_gib=24)


@pytest.fixture(scope="module")
def config():
    return load_config("1b")


@pytest.fixture(scope="module")
def found(config):
    return search(config, 64, SMALL)


def test_it_finds_what_trying_everything_finds(config, found):
    shape = TransformerShape.from_model(config.model, config.data.sequence_length)
    everything = [estimate(shape, layout, SMALL) for layout in layouts(config, 64, SMALL)]
    fitting = [one for one in everything if one.fits]
    assert (found.tried, found.num_fitting) == (len(everything), len(fitting))
    assert 0 < len(fitting) < len(everything)
    assert found.fitting[0].time.total == min(one.time.total for one in fitting)
    times = [one.time.total for one in found.fitting]
    assert times == sorted(times) and all(one.fits for one in found.fitting)


def test_layouts_are_those_that_the_configuration_accepts(config):
    seen = set(layouts(config, 64, H100))
    axes = {(one.tensor_parallel, one.pipeline_parallel, one.virtual_pipeline_parallel) for one in seen}
    assert {(1, 1, 1), (8, 1, 1), (2, 4, 3), (1, 8, 1)} <= axes
    assert (16, 1, 1) not in axes and (1, 5, 1) not in axes  # beyond a node; 24 layers
    assert all(one.micro_batch_size * one.data_parallel * one.num_micro_batches == 256 for one in seen)
    interleaved = [one for one in seen if one.virtual_pipeline_parallel > 1]
    assert interleaved and all(one.num_micro_batches % one.pipeline_parallel == 0 for one in interleaved)


def test_less_memory_leaves_fewer_layouts_and_at_last_none(config, found):
    half = search(config, 64, replace(H100, memory_gib=12))
    assert 0 < half.num_fitting < found.num_fitting
    none = search(config, 64, replace(H100, memory_gib=0.1))
    assert none.num_fitting == 0 and none.smallest is not None and not none.smallest.fits


def test_a_misfit_says_by_how_much_and_what_to_cut():
    big = load_config("chameleon_34b", ["parallel.tensor_parallel=1", "parallel.sequence_parallel=false"])
    one = estimate_run(big, 1024, H100)
    assert not one.fits
    excess = f"{one.total_gib - 0.93 * 79.1:.1f} too much"
    assert excess in one.why_not() and "the largest part is gradients" in one.why_not()
    long = replace(big.training, micro_batch_size=8)
    assert "activations" in estimate_run(replace(big, training=long), 192, H100).why_not()


def test_an_optimizer_that_is_split_already_needs_more_gpus():
    one = estimate_run(load_config("chameleon_34b"), 8, H100)
    assert "the largest part is optimizer" in one.why_not() and one.why_not().endswith("so take more of them")
    whole = ["parallel.distributed_optimizer=false", "parallel.overlap_param_gather=false"]
    assert "distributed_optimizer=true" in estimate_run(load_config("chameleon_34b", whole), 64, H100).why_not()


def test_throughput_days_and_cost_follow_from_the_step(config):
    one = estimate_run(config, 64, replace(H100, price_per_gpu_hour=2.0))
    tokens = 1e12
    assert one.tokens_per_second * 64 * one.time.total == pytest.approx(256 * 4096)
    assert one.gpu_hours(tokens) == pytest.approx(64 * tokens / (256 * 4096) * one.time.total / 3600)
    assert one.gpu_hours(tokens) == pytest.approx(64 * 24 * one.days(tokens))
    assert one.as_plain(tokens)["cost"] == pytest.approx(2 * one.gpu_hours(tokens))
    assert one.mfu_full_attn > one.mfu_causal
    flops = 6 * (config.model.num_parameters - 65_536 * 2048) * one.tokens_per_second  # norms count as 1e-4 here
    attention = 6 * 24 * 4096 * 2048 * one.tokens_per_second
    assert one.mfu_causal == pytest.approx((flops + attention) / 989e12, rel=1e-3)


def test_clusters_are_found_by_name_or_read_from_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    text = "name: mine\ngeneration: hopper\nbf16_tflops: 500\nfp8_tflops: 0\nmemory_gib: 60\nmemory_tb_s: 2\n"
    path.write_text(text + "nvlink_gb_s: 100\nnetwork_gb_s: 10\n")
    assert find_cluster("H200").memory_gib == 139.8 and find_cluster(str(path)).nvlink_gb_s == 100
    for wrong, message in (
        ("nvlink_gbs: 100\nnetwork_gb_s: 10\n", "nvlink_gbs: unknown key; did you mean 'nvlink_gb_s'"),
        ("nvlink_gb_s: 100\nnetwork_gb_s: -1\n", "network_gb_s: -1.0 must be a positive number"),
        ("nvlink_gb_s: 100\n", "network_gb_s: missing"),
    ):
        path.write_text(text + wrong)
        with pytest.raises(ValueError, match=message):
            find_cluster(str(path))
    with pytest.raises(ValueError, match=r"neither a file nor a cluster; did you mean 'h100'"):
        find_cluster("h1000")


def test_the_picture_has_every_layout_part_and_number(found, tmp_path):
    write_picture(tmp_path / "plan.html", "a <title>", found.fitting[:3])
    page = (tmp_path / "plan.html").read_text()
    assert "a &lt;title&gt;" in page and page.count("<svg") == 2 and "http" not in page
    for one in found.fitting[:3]:
        assert page.count(one.layout.describe()) >= 2 and f"{1e3 * one.time.total:,.0f}" in page
    assert "matrix products" in page and "activations" in page
