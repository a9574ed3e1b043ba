"""examples/distill.py: a student's divergence from a teacher falls."""

import importlib.util

import torch
from paths import ROOT

from tokenrl.demo import model


def test_a_student_comes_near_its_teacher():
    spec = importlib.util.spec_from_file_location("distill_example", ROOT / "examples" / "distill.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    teacher, student = (model.build(seed, torch.device("cpu")) for seed in (0, 1))
    teacher.lm_head.weight.data.mul_(20)  # of random weights, and yet with something to learn
    history = example.distill(student, teacher, 30)
    assert sum(history[-5:]) < 0.6 * sum(history[:5]), history
