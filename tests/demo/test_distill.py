"""examples/distill.py: a student's divergence from a teacher falls."""

import importlib.util

import pytest
import torch
from paths import ROOT

from tokenrl.demo import model


@pytest.mark.parametrize("by", ["whole", "topk", "sampled"])
def test_a_student_comes_near_its_teacher(by):
    spec = importlib.util.spec_from_file_location("distill_example", ROOT / "examples" / "distill.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    teacher, student = (model.build(seed, torch.device("cpu")) for seed in (0, 1))
    teacher.lm_head.weight.data.mul_(20)  # of random weights, and yet with something to learn
    history = example.distill(student, teacher, 8, by)
    assert sum(history[-2:]) < 0.6 * sum(history[:2]), history
