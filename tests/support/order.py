"""Which tests run, and in which order: the long ones first; with --check, the few of `make check`."""

import re
from pathlib import Path

import pytest
import sim
from paths import ROOT

# File: what of it, and why that is enough between two edits. Every room is here; the rest is for `make test`.
CHECK = {
    "objectives/test_paper.py": ("test_paper", "every row of the table: loss and gradient are its paper's formula"),
    "objectives/test_table.py": ("", "what each row must have"),
    "ops/test_product.py": (
        r"test_padded.*-cpu\]|test_padded\[ppo_clip.*-triton",
        "each gate x statistic x flow on the C++ kernels against the reference; one gate through the interpreter",
    ),
    "ops/test_contract.py": ("schema", "every backend has the ops of the contract"),
    "ops/test_backends.py": ("", "which backend is chosen"),
    "logprobs/test_from_logits.py": (r"outputs_together.*-cpu\]", "every output and gradient, each dtype"),
    "logprobs/test_from_logits_errors.py": ("", "wrong arguments are named"),
    "logprobs/test_from_hidden.py": ("every_value_and_gradient.*-cpu", "the same from hidden states"),
    "losses/test_linear_policy.py": ("rows_of_the_table.*-cpu-", "every row from hidden states, each dtype"),
    "losses/test_policy_errors.py": ("named|nearest", "wrong arguments are named"),
    "losses/test_rollout_weights.py": ("", "formulas in loops"),
    "losses/test_rollout_rejection.py": ("", "formulas in loops"),
    "advantages/test_per_sequence.py": ("", "verl's outputs and formulas in loops"),
    "advantages/test_rewards.py": ("golden", "recorded outputs"),
    "advantages/test_segments.py": ("golden_(chain|tree)", "recorded outputs"),
    "advantages/test_prefix_tree.py": ("golden", "recorded outputs"),
    "methods/test_bandpo.py": ("golden", "recorded outputs"),
    "methods/test_bounds.py": ("golden|formula", "one paper's own part, with its recorded outputs"),
    "methods/test_gtpo.py": ("golden_weights", "recorded outputs"),
    "methods/test_tw_grpo.py": ("golden.*cpu", "recorded outputs, loss and gradient"),
    "methods/test_top_entropy.py": ("", "formulas in loops"),
    "golden/test_golden.py": (r"-cpu\]|every_family", "the first case of every family"),
    "golden/test_golden_detached.py": (r"-cpu\]", "the first case of every family"),
    "golden/test_golden_forms.py": (r"-cpu\]", "the first case of every family"),
    "golden/test_golden_vocab.py": (r"-cpu\]", "the first case of every family"),
    "kernels/test_cuda_host.py": (r"shim\]|driver", "the simulation of CUDA; its kernels take a minute to build"),
    "compat/test_compat.py": ("named|chunk_size|without_gradient", "the drop-ins without their originals"),
    "instruments/test_parity.py": ("", "the tolerance rule rejects wrong gradients"),
    "instruments/test_doctor.py": ("remedy|nothing", "what is missing has its remedy"),
    "instruments/test_profiler.py": ("counts|gpu|apart", "what a profile counts, what it reads of a GPU"),
    "instruments/test_cli.py": ("objective|unknown", "the command line"),
    "fusion/test_fuse.py": ("cannot_be_traced|no_gate", "what no kernel can be made of is named"),
    "demo/test_demo.py": ("solutions|hand_cases|apart", "its task; the run takes half a minute"),
    "docs/test_docs.py": ("", "README and the pages"),
}  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--check", action="store_true", help="the tests of `make check`: a minute's worth of every room")


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes many seconds; it starts first, so that no worker ends on it")
    sim.wanted = not config.getoption("check")
    if gone := [file for file in CHECK if not (ROOT / "tests" / file).exists()]:
        raise pytest.UsageError(f"tests/support/order.py: CHECK names {gone}, which are not there")


def pytest_ignore_collect(collection_path: Path, config):
    file = collection_path.suffix == ".py" and collection_path.name.startswith("test_")
    if config.getoption("check") and file and in_tests(collection_path) not in CHECK:
        return True


def in_tests(path: Path) -> str:
    return path.relative_to(ROOT / "tests").as_posix()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items, config):
    if config.getoption("check"):
        kept = [item for item in items if re.search(CHECK[in_tests(item.path)][0], item.name)]
        items[:] = one_of_each_family(kept)
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def one_of_each_family(items) -> list:
    seen, kept = set(), []
    for item in items:
        if item.path.parent.name == "golden":
            params = getattr(item, "callspec", None)
            family = item.originalname, params and params.params.get("family")
            if family in seen:
                continue
            seen.add(family)
        kept.append(item)
    return kept
