"""A wrong configuration is refused with the name, the rule and the value."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError
from worker_toys import MIXTURE, MODEL, TRAINING, run_config

from workers.config import RunConfig

GOOD = {"model": MODEL, "mixture": MIXTURE, "training": TRAINING, "seed": 1}


@pytest.mark.parametrize(
    ("section", "key", "value", "rule"),
    [
        ("training", "stepz", 5, "Extra inputs are not permitted"),
        ("model", "hiden_size", 5, "Unexpected keyword argument"),
        ("mixture", "gama", 0.5, "Unexpected keyword argument"),
        (None, "sed", 5, "Extra inputs are not permitted"),
        ("training", "steps", "50", "valid integer"),
        ("training", "steps", 0, "greater than or equal to 1"),
        ("training", "steps", 2.5, "valid integer"),
        ("training", "reproducible", 1, "valid boolean"),
        ("training", "precision", "fp16", "'fp32', 'tf32' or 'bf16'"),
        ("training", "learning_rate", 0.0, "greater than 0"),
        ("training", "learning_rate", "1e-4", "valid number"),
        ("training", "ema_decay", 1.0, "less than 1"),
        ("training", "adam_beta2", 1.0, "less than 1"),
        ("training", "weight_decay", -0.1, "greater than or equal to 0"),
        ("training", "keep_checkpoints", 0, "greater than or equal to 1"),
        ("training", "global_batch_size", 20, "multiple of num_shards 8, got 20; choose 16"),
        ("training", "global_batch_size", 4, "multiple of num_shards 8, got 4; choose 8"),
        ("training", "checkpoint_every", 7, "multiple of log_every 5, got 7"),
        ("model", "depth", True, "valid integer"),
        ("model", "input_size", 10, "multiple of patch_size 4, got 10"),
        ("model", "class_dropout_prob", 1.0, "[0, 1), got 1.0"),
        ("mixture", "gamma", 1.5, "[0, 1], got 1.5"),
        ("mixture", "time_law", "gamma", "'beta', 'uniform', 'logit_normal' or 'log_normal_angle'"),
        (None, "path", "straight", "'linear', 'gvp' or 'vp'"),
        (None, "prediction", "x", "'velocity', 'noise', 'score' or 'data'"),
        (None, "seed", -1, "greater than or equal to 0"),
    ],
)
def test_a_wrong_value_is_refused(section, key, value, rule):
    values = json.loads(json.dumps(GOOD))
    values["training"]["log_every"] = 5
    (values[section] if section else values)[key] = value
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate_json(json.dumps(values))
    (error,) = caught.value.errors()
    message = str(caught.value)
    assert key in message
    assert rule in message
    assert str(value) in message
    assert section is None or section == error["loc"][0]


@pytest.mark.parametrize("key", ["model", "mixture", "training", "seed"])
def test_what_has_no_default_must_be_given(key):
    with pytest.raises(ValidationError, match=key):
        RunConfig.model_validate_json(json.dumps({k: v for k, v in GOOD.items() if k != key}))


def test_a_run_survives_json_and_cannot_be_changed():
    run = run_config()
    assert RunConfig.model_validate_json(run.model_dump_json()) == run
    with pytest.raises(ValidationError, match="frozen"):
        run.seed = 2
    with pytest.raises(ValidationError, match="frozen"):
        run.training.steps = 2
