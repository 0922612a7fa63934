"""The experiment file: what is read, what is refused, what belongs to its identity, who is judged against whom."""

import re
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestration.experiment import Experiment, derived_seed
from orchestration.plan import costs
from orchestration.recipe import filled, load, read, recipes, to_be_given, validated
from orchestration.workflow import stages_of

BETA = "{time_law: beta, slowing_law: interval, gamma: 0, target_time: m}"
SBDM = "evaluation.samplers must start above 0 for diffusion sbdm on path linear, where it is infinite at 0, got sde20"
SLOWED = "{time_law: uniform, slowing_law: interval, gamma: 0.5, target_time: m}"
TABLES = ("paper-ablation", "paper-gamma", "paper-steps")
PUBLISHED = ("sit-b-256", "sit-xl-256", "sit-xl-512", "repa-xl-256", "rae-xl-256", "rae-xl-512", "sd35-medium")

STANDARD = {"time_law": "uniform", "slowing_law": "interval", "gamma": 0, "target_time": "m", "shift": 1}

MINIMAL = """
name: minimal
data: {digits: {}}
model: {input_size: 8, patch_size: 4, in_channels: 1, hidden_size: 32, depth: 2, num_heads: 4, num_classes: 10}
base: {train: {steps: 20, global_batch_size: 16}}
training: {steps: 10, global_batch_size: 16}
mixture: {time_law: beta, slowing_law: interval, gamma: 0.8, target_time: m}
arms:
  none: {train: false}
  standard: {mixture: {time_law: uniform, gamma: 0}}
  mixflow: {}
  matched: {mixture: {condition_on: m}}
evaluation: {samplers: [{method: euler, num_steps: 4}], primary: fd_digits/euler4/s1}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def with_arms(file: Path, arms: dict[str, Any]) -> Experiment:
    settings = yaml.safe_load(file.read_text())
    settings["arms"] = arms
    file.write_text(yaml.safe_dump(settings))
    return load(str(file))


def test_an_exponent_without_a_dot_is_a_number(file):
    file.write_text(MINIMAL.replace("{steps: 10,", "{steps: 10, learning_rate: 3e-4, weight_decay: 1e-2,"))
    assert load(str(file)).training.learning_rate == 0.0003
    assert load(str(file)).training.weight_decay == 0.01
    assert load(str(file), ["training.learning_rate=2e-05"]).training.learning_rate == 0.00002
    assert load(str(file), ["training.learning_rate=1.5E-4"]).training.learning_rate == 0.00015


def test_quotes_keep_an_exponent_text(file):
    with pytest.raises(ValueError, match=r"training\.learning_rate must be a number, got '1e-4'"):
        load(str(file), ["training.learning_rate='1e-4'"])


def test_overrides_reach_sections_lists_and_keys_that_were_not_there(file):
    changed = load(
        str(file),
        [
            "seed=7",
            "training.steps=11",
            "evaluation.samplers.0.num_steps=9",
            "evaluation.primary=recall_digits/euler9/s1",
            "arms.mixflow.mixture.shift=3",
            "arms.matched.mixture={condition_on: m, shift: 3}",
            "cluster.num_workers=2",
            "data.digits.held_out=300",
        ],
    )
    assert (changed.seed, changed.training.steps) == (7, 11)
    assert changed.evaluation.samplers[0].num_steps == 9
    assert changed.mixture_of("mixflow").shift == 3.0
    assert changed.mixture_of("matched").shift == 3.0
    assert changed.cluster.num_workers == 2
    assert changed.data.digits.held_out == 300


def test_a_value_may_hold_an_equals_sign_and_the_last_override_counts(file):
    with pytest.raises(ValueError, match=r"data\.shards|exactly one"):
        load(str(file), ["data.shards=dir/key=value"])
    assert load(str(file), ["data={shards: /dir/key=value}"]).data.shards == "/dir/key=value"
    assert load(str(file), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.steps", "--set must be dotted.key=value, got 'training.steps'"),
        ("=3", "--set must be dotted.key=value, got '=3'"),
        ("training.steps = 3", "--set must be dotted.key=value without blanks around =, got 'training.steps = 3'"),
        ("training.steps=[1", "--set training.steps must have a value that is YAML, got '[1'"),
        ("evaluation.samplers.1.num_steps=3", "'1' must be a place in a list of 1, counted from 0"),
        ("evaluation.samplers.x.num_steps=3", "'x' must be a place in a list of 1, counted from 0"),
        ("evaluation.samplers.-1={}", "'-1' must be a place in a list of 1, counted from 0"),
        ("name.first=3", "name must be a section, got the value 'minimal'"),
    ],
)
def test_overrides_that_are_none(file, override, words):
    with pytest.raises(ValueError, match="--set") as raised:
        load(str(file), [override])
    assert words in str(raised.value)


def test_a_key_given_twice_is_refused_at_every_depth(file):
    for text in (MINIMAL + "name: again\n", MINIMAL.replace("{steps: 10,", "{steps: 10, steps: 20,")):
        file.write_text(text)
        with pytest.raises(ValueError, match="is given twice"):
            load(str(file))


@pytest.mark.parametrize("recipe", recipes())
def test_a_recipe_survives_json(recipe):
    experiment = validated(recipe, filled(read(recipe)))
    again = Experiment.model_validate_json(experiment.model_dump_json())
    assert again == experiment
    assert again.identity == experiment.identity
    assert [stage.settings for stage in stages_of(again)] == [stage.settings for stage in stages_of(experiment)]


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_slow_flow_costs_at_most_a_twentieth_of_a_published_recipes_training(recipe):
    """In network evaluations, one forward and a backward of twice its work a training image.

    A pair takes one rollout, what is left after a third and two thirds of it, and ten times at which true states are
    read; Heun asks twice a step, guidance doubles that. The guided samplers of the recipe are dearer than the two that
    are measured where none are given.
    """
    experiment = validated(recipe, filled(read(recipe)))
    training = experiment.training.steps * experiment.training.global_batch_size * 3
    for samplers in (experiment.slow_flow_samplers, experiment.evaluation.samplers):
        evaluations = 0
        for sampler in samplers:
            a_step = (2 if sampler.method in ("heun", "sde_heun") else 1) * (1 if sampler.guidance_scale == 1 else 2)
            evaluations += a_step * (2 * sampler.num_steps + 1) + 2 * 10
        assert evaluations * experiment.evaluation.slow_flow_samples <= 0.05 * training


def test_the_recipes_are_there():
    assert {"quickstart", "digits32", "correctives", *TABLES, *PUBLISHED} == set(recipes())


@pytest.mark.parametrize("recipe", TABLES)
def test_the_tables_share_bases_data_and_equal_arms(recipe):
    """What is the same in two of them has one identity, so that it is trained once."""
    tables = {name: stages_of(load(name)) for name in TABLES}
    mine = {stage.name: stage for stage in tables[recipe]}
    for other in tables.values():
        for stage in other:
            if stage.kind in ("data", "base") or stage.name.startswith(("arms/standard/", "slow-flow/base")):
                assert mine[stage.name] == stage
    ablation, gamma, steps = (load(name) for name in TABLES)
    for pair in range(8):
        assert ablation.arm_run("beta-slowed", pair) == gamma.arm_run("gamma-1.0", pair)
        assert gamma.arm_run("gamma-0.8", pair) == steps.arm_run("mixflow", pair)
        assert gamma.arm_run("matched-0.8", pair) == steps.arm_run("matched", pair)


@pytest.mark.parametrize("recipe", TABLES)
def test_a_table_can_be_made_small(recipe):
    full, small = load(recipe), load(recipe, ["scale=small"])
    assert load(recipe, ["scale=full"]) == full
    assert (full.bases, full.replicates, full.evaluation.num_samples) == (3, 2, 2500)
    assert (small.bases, small.replicates, small.training.steps) == (2, 1, 60)
    assert small.arms == full.arms
    assert load(recipe, ["training.steps=40", "scale=small"]).training.steps == 40, "what is set beside it counts more"
    with pytest.raises(ValueError, match="--set scale must be one of full, small, got 'tiny'; correct it"):
        load(recipe, ["scale=tiny"])


def test_a_file_takes_the_sections_it_lacks_from_another(tmp_path):
    child = tmp_path / "child.yaml"
    child.write_text("extends: quickstart\nname: child\nreplicates: 2\n")
    found, parent = load(str(child)), load("quickstart")
    assert (found.name, found.replicates) == ("child", 2)
    assert found.model_copy(update={"name": "quickstart", "replicates": 3}) == parent
    child.write_text("extends: paper-steps\nname: child\n")
    with pytest.raises(ValueError, match="extends must name a recipe that extends none itself, got 'paper-steps'"):
        load(str(child))
    child.write_text("extends: [quickstart]\nname: child\n")
    with pytest.raises(ValueError, match=r"extends must name another recipe or file, got \['quickstart'\]"):
        load(str(child))


ARMS = (
    "arms.none={train: false}",
    "arms.scaled={train: false, sampling: {epsilon_scale: 1.01}}",
    "arms.perturbed={mixture: {time_law: uniform, gamma: 0}, corrective: {input_perturbation: 0.1}}",
)


def test_each_arm_is_compared_with_what_it_differs_from(file):
    experiment = load(str(file), ARMS)
    assert experiment.controls_of("none") == ["standard", "matched"]
    assert experiment.controls_of("scaled") == ["standard", "none", "matched"]
    assert experiment.controls_of("perturbed") == ["standard", "matched"]
    assert experiment.controls_of("mixflow") == ["standard", "matched"]
    assert experiment.controls_of("matched") == ["standard"]
    assert experiment.arm_run("perturbed", 0).corrective.input_perturbation == 0.1
    assert experiment.arm_run("standard", 0).corrective.is_off


def test_arms_that_differ_in_sampling_alone_share_their_training(file):
    stages = {
        s.name: s
        for s in stages_of(load(str(file), [*ARMS, "arms.both={sampling: {epsilon_scale: 1.01}, judged: false}"]))
    }
    assert stages["arms/both/0"].settings == stages["arms/mixflow/0"].settings
    assert stages["samples/both/0"].settings != stages["samples/mixflow/0"].settings
    assert stages["samples/scaled/0"].inputs == stages["samples/none/0"].inputs == ("base",)


def test_a_slowed_arm_with_a_corrective_needs_its_own_control(file):
    arm = "arms.slowed={corrective: {input_perturbation: 0.1}}"
    with pytest.raises(
        ValueError, match=r"must include the matched-marginal control of 'slowed'.*or set its judged to"
    ):
        load(str(file), [arm])
    control = "arms.its={mixture: {condition_on: m}, corrective: {input_perturbation: 0.1}}"
    assert load(str(file), [arm, control]).controls_of("slowed") == ["standard", "mixflow", "its"]
    load(str(file), [arm, "arms.slowed.judged=false"])


def test_several_bases_are_trained_with_seeds_of_their_own(file):
    experiment = load(str(file), ["bases=3", "replicates=2"])
    assert experiment.num_pairs == 6
    assert [experiment.base_of(pair) for pair in range(6)] == [0, 0, 1, 1, 2, 2]
    assert len({experiment.base_run(base).seed for base in range(3)}) == 3
    assert len({experiment.arm_run("mixflow", pair).seed for pair in range(6)}) == 6
    stages = {stage.name: stage for stage in stages_of(experiment)}
    assert stages["arms/mixflow/3"].inputs == ("data", "base/1")
    assert "base" not in stages
    one = load(str(file), ["replicates=6"])
    assert one.base_run() == experiment.base_run(0)
    assert one.arm_run("mixflow", 4) == experiment.arm_run("mixflow", 4)
    with pytest.raises(ValueError, match="replicates times bases must be at least 2 for an interval, got 1"):
        load(str(file), ["replicates=1"])
    with pytest.raises(ValueError, match=r"bases must be 1 for a given base\.checkpoint, got 2"):
        load(str(file), ["bases=2", "base={checkpoint: /x.pt, sha256: " + "a" * 64 + "}"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("evaluation.first_base_only=[euler9/s1]", "first_base_only must name cells, not the primary one, of"),
        ("evaluation.first_base_only=[euler4/s1]", "first_base_only must name cells, not the primary one, of"),
        (
            "evaluation.primary=sfid_digits/euler4/s1",
            "got 'sfid_digits/euler4/s1'; of the extractors inception alone gives spatial features: add it and ask for",
        ),
        ("evaluation.primary=fid/euler4/s1", "got 'fid/euler4/s1'; add the extractor inception"),
        ("evaluation.extractors=[{kind: digits}, {kind: digits}]", "extractors must be of different kinds"),
        ("evaluation.extractors=[{kind: digits, weights: x}]", "weights must be left out for digits"),
        ("evaluation.extractors=[{kind: inception}]", "weights must be given for the extractor inception"),
        ("evaluation.reference={}", "reference must give exactly one of 'split' and 'npz'"),
        ("evaluation.reference={npz: x}", "reference must give 'npz' and 'sha256' together"),
        ("evaluation.label_law=even", "evaluation.label_law must be 'equal' or 'random', got 'even'"),
        ("claims=[{arm: a, control: mixflow, expected: better, published: x}]", "claims must name arms"),
        (
            "claims=[{arm: mixflow, control: mixflow, expected: better, published: x}]",
            "claims.0.control must be another arm than arm, got 'mixflow' for both",
        ),
        (
            "evaluation.reference={split: train, npz: x}",
            "evaluation.reference must give exactly one of 'split' and 'npz'",
        ),
        ("arms.mixflow.sampling={epsilon_scale: 0}", "epsilon_scale must be above 0, got 0"),
        ("arms.mixflow.sampling={time_shift_window: 0.1}", "time_shift_cutoff must lie in (0, 1]"),
        ("arms.standard.corrective={rollout_share: 0.5}", "rollout_step must lie in (0, 1] with rollout_share"),
        ("arms.none={train: false, corrective: {input_perturbation: 0.1}}", "must be left out where train is false"),
    ],
)
def test_wrong_evaluations_and_arms(file, override, words):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as raised:
        load(str(file), [override])
    assert words in str(raised.value)


def test_digits_are_judged_by_their_classifier_alone(file):
    override = "evaluation.extractors=[{kind: dinov2, weights: /x, sha256: " + "a" * 64 + "}]"
    with pytest.raises(ValueError, match="must be digits for images of 1 channels, got dinov2, which sees colours"):
        load(str(file), [override, "evaluation.primary=fd_dinov2/euler4/s1"])


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_published_recipe_asks_for_paths_alone_and_says_what_was_reproduced(recipe):
    missing = to_be_given(read(recipe))
    kinds = {key.rpartition(".")[2].removesuffix("_sha256") for key in missing}
    paths = {"source", "features", "weights", "decoder", "statistics", "checkpoint", "text_encoders", "sha256", "npz"}
    assert kinds <= paths | {"num_classes"}
    with pytest.raises(ValueError, match=rf"^{recipe}: {missing[0]} must be given \({len(missing)} in all: .*--set"):
        load(recipe)
    with pytest.raises(ValueError, match=rf"^{recipe}: {missing[1]} must be given \({len(missing) - 1} in all"):
        load(recipe, [f"{missing[0]}=x"])
    text = resources.files("orchestration.recipes").joinpath(f"{recipe}.yaml").read_text()
    assert "Figure to reach" in text
    assert "ot reproduced here" in text


@pytest.mark.parametrize(
    ("recipe", "parameters", "flops"),
    # As published, and twice the multiply-adds that SiT's paper gives for XL/2 at 256; REPA's projector comes to it.
    [("sit-b-256", 130_512_416, None), ("sit-xl-256", 675_129_632, 237.2), ("repa-xl-256", 683_242_512, 241.4),
     ("rae-xl-256", 838_675_796, None), ("sd35-medium", 2_243_171_520, None)],
)  # fmt: skip
def test_a_published_recipe_costs_what_its_paper_says(recipe, parameters, flops):
    found = costs(validated(recipe, filled(read(recipe))))
    assert found["parameters"] == parameters
    if flops:
        assert found["forward_gflops_per_image"] == pytest.approx(flops, abs=0.05)


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ("quickstart", "codec={kind: identity, image_size: 8}", "codec must be left out for data.digits"),
        ("quickstart", "model.family=dit", "model.family must be one of sit, ddt, sd3, got 'dit'; did you mean 'sit'?"),
        ("quickstart", "model.hiden_size=8", "unknown key 'model.hiden_size'; did you mean 'hidden_size'?"),
        ("quickstart", "alignment_weight=0.5", "alignment_weight must be 0 for a model without exactly one projector"),
        ("quickstart", f"base.mixture={SLOWED}", "base.mixture must be standard interpolation, m = t"),
        ("quickstart", f"base.mixture={BETA}", "arms must include standard training {mixture: {time_law: beta"),
        ("quickstart", "path=vp", "samplers must stay in [0, 0.999] for velocity prediction on path vp, got"),
        ("quickstart", "weighting=velocity", "weighting must be none for velocity prediction, got velocity"),
        ("quickstart", "prediction=noise", "must stay in [0.001, 0.999] for noise prediction on path linear, got"),
        ("quickstart", "evaluation.samplers.4={method: sde, num_steps: 20, diffusion: sbdm}", SBDM),
        ("quickstart", "evaluation.samplers.4={method: sde, num_steps: 20, diffusion: sbdm, start: 0.01}", None),
        ("quickstart", "evaluation.samplers.5.guidance=autoguidance", "guide must be given for euler8/s1.5-auto"),
        ("quickstart", "evaluation.samplers.5.guidance_channels=2", "guidance_channels must be at most model.in_chan"),
        ("quickstart", "training.sharded=true", None),
        ("quickstart", "training={steps: 5, global_batch_size: 9, num_shards: 9, sharded: true}", "must divide"),
        ("rae-xl-256", "guide.model.input_size=8", "guide.model.input_size must be the model's 16, got 8; set it"),
        ("repa-xl-256", "data.images={source: x, held_out: 100}", "data.images.features must be given"),
        ("sit-b-256", "data.images.held_out=10", "data.images.held_out must be at least 100, got 10"),
        ("rae-xl-256", "codec=null", "codec must be given for data.images"),
        (
            "sd35-medium",
            "data.images={source: x, held_out: 100}",
            "data.images.text_encoders must be given for model.family sd3, got the other",
        ),
        (
            "sit-b-256",
            f"data.images={{source: x, held_out: 100, text_encoders: x, text_encoders_sha256: '{'0' * 64}'}}",
            "data.images.text_encoders must be left out for model.family sit, got the other",
        ),
        ("sd35-medium", "base={train: {steps: 5, global_batch_size: 8}}", "arms must include standard training"),
        ("sd35-medium", "model.lora_rank=4", None),
    ],
)  # fmt: skip
def test_what_the_families_add_is_validated(recipe, override, message):
    if message is None:
        validated(recipe, filled(read(recipe, [override])))
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        validated(recipe, filled(read(recipe, [override])))


def test_identity_ignores_the_cluster_alone(file):
    base = load(str(file)).identity
    same = ["num_workers=4", "cpus_per_worker=2", "gpus_per_worker=1", "max_failures=0"]
    assert {load(str(file), [f"cluster.{change}"]).identity for change in same} == {base}
    changes = [
        "name=other",
        "seed=1",
        "data.digits.held_out=598",
        "model.depth=3",
        "model.class_dropout_prob=0.2",
        "path=gvp",
        "base.train.steps=21",
        "base.train.learning_rate=2e-4",
        "training.steps=11",
        "training.reproducible=true",
        "mixture.gamma=0.7",
        "arms.third={}",
        "replicates=4",
        "evaluation.num_samples=100",
        "evaluation.recall_margin=0.03",
        "evaluation.samplers.0.guidance_scale=1.0",
        "evaluation.sample_batch_size=100",
    ]
    found = {change: load(str(file), [change]).identity for change in changes}
    assert found.pop("evaluation.samplers.0.guidance_scale=1.0") == base, "the default, written out"
    assert base not in found.values()
    assert len(set(found.values())) == len(found)


def test_seeds_differ_by_use_and_number_and_not_by_arm(file):
    experiment = load(str(file), ["replicates=5"])
    uses = product(range(4), ("base", "training", "sampling"), range(12))
    assert len({derived_seed(*use) for use in uses}) == 4 * 3 * 12
    assert derived_seed(1, "training", 11) != derived_seed(11, "training", 1)
    for k in range(5):
        assert len({experiment.arm_run(arm, k).seed for arm in ("standard", "mixflow", "matched")}) == 1
    seeds = [experiment.base_run().seed]
    seeds += [experiment.arm_run("mixflow", k).seed for k in range(5)]
    seeds += [experiment.sampling_seed(k) for k in range(5)]
    assert len(set(seeds)) == 11
    assert all(0 <= seed < 2**63 for seed in seeds), "torch's generators take no more"
    assert load(str(file), ["seed=1"]).arm_run("mixflow", 0).seed not in seeds


def test_the_base_is_trained_by_standard_flow_matching(file):
    run = load(str(file)).base_run()
    assert (run.mixture.gamma, run.mixture.time_law, run.mixture.condition_on) == (0, "uniform", "t")
    assert run.training.steps == 20


def test_each_treatment_is_judged_against_standard_and_its_own_matched_marginal(file):
    experiment = with_arms(
        file,
        {
            "none": {"train": False},
            "slow": {"mixture": {"gamma": 0.8}},
            "plain": {"mixture": STANDARD},
            "fast": {"mixture": {"gamma": 0.2}},
            "fast_matched": {"mixture": {"gamma": 0.2, "condition_on": "m"}},
            "slow_matched": {"mixture": {"gamma": 0.8, "condition_on": "m"}},
        },
    )
    assert sorted(experiment.controls_of("slow")) == ["plain", "slow_matched"]
    assert sorted(experiment.controls_of("fast")) == ["fast_matched", "plain"]
    for arm in experiment.arms:
        assert arm not in experiment.controls_of(arm)
    assert "plain" in experiment.controls_of("none")
    assert "plain" in experiment.controls_of("slow_matched")


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ({"mixflow": {}, "matched": {"mixture": {"condition_on": "m"}}}, "arms must include standard training"),
        ({"standard": {"mixture": STANDARD}, "mixflow": {}}, "the matched-marginal control of 'mixflow'"),
        (
            {
                "standard": {"mixture": STANDARD},
                "mixflow": {},
                "matched": {"mixture": {"condition_on": "m", "gamma": 0.4}},
            },
            "the matched-marginal control of 'mixflow'",
        ),
        (
            {"standard": {"mixture": STANDARD | {"time_law": "beta"}}, "none": {"train": False}},
            "arms must include standard training",
        ),
    ],
)
def test_no_claim_without_its_controls(file, arms, words):
    with pytest.raises(ValueError, match="arms must include") as raised:
        with_arms(file, arms)
    assert words in str(raised.value)


def test_one_form_for_one_law(file):
    """Without slowing m = t, whatever is said about the target's time and the time told."""
    forms = [
        {**STANDARD, "condition_on": told, "target_time": target} for told, target in product(("t", "m"), ("t", "m"))
    ]
    experiment = with_arms(file, {f"form{i}": {"mixture": form} for i, form in enumerate(forms)})
    laws = {experiment.mixture_of(arm) for arm in experiment.arms}
    assert len(laws) == 1
    assert experiment.arm_run("form0", 1) == experiment.arm_run("form3", 1)
    # With slowing they are different methods.
    slowed = load("quickstart")
    assert slowed.mixture_of("mixflow") != slowed.mixture_of("matched")
    assert slowed.mixture_of("matched").gamma == 0.8


def test_an_experiment_without_slowing_needs_no_matched_control(file):
    experiment = load(str(file), ["mixture.gamma=0"])
    assert experiment.mixture_of("mixflow") == experiment.mixture_of("matched")
    assert experiment.controls_of("mixflow") == ["standard"]


@pytest.mark.parametrize("name", ["<b>x", "a/b", "..", "", "a b", "-x", "é", "a\nb", "a\n"])
def test_names_of_arms_fit_paths(file, name):
    arms = {"standard": {"mixture": STANDARD}, name: {"mixture": STANDARD}}
    with pytest.raises(ValueError, match="arms must have names of letters") as raised:
        with_arms(file, arms)
    assert "\n" not in str(raised.value)


def test_an_unknown_key_names_the_nearest_one(file):
    for override, nearest in [
        ("traning.steps=5", "training"),
        ("training.stepz=5", "steps"),
        ("mixture.gama=0.3", "gamma"),
        ("arms.mixflow.trian=true", "train"),
        ("arms.mixflow.mixture.gama=0.3", "gamma"),
        ("evaluation.samplers.0.num_step=3", "num_steps"),
        ("base.train.globl_batch_size=3", "global_batch_size"),
        ("data.digits.imagesize=8", "image_size"),
        ("model.dept=8", "depth"),
    ]:
        with pytest.raises(ValueError, match="unknown key") as raised:
            load(str(file), [override])
        assert str(raised.value).endswith(f"did you mean {nearest!r}?"), override


def test_a_classifier_of_one_class_is_no_extractor():
    with pytest.raises(ValueError, match=r"extractors must not have digits where model.num_classes is 1"):
        load("quickstart", ["data={shards: s3://bucket/x}", "model.num_classes=1"])


def test_a_weighting_needs_targets_where_it_is_finite():
    """SiT's weighted losses leave out both ends; slowing over the whole of [0, t] reaches the lower one again."""
    inside = "{method: euler, num_steps: 8, start: 0.001, end: 0.999}"
    given = [
        "prediction=noise", "weighting=velocity", f"evaluation.samplers=[{inside}]",
        f"evaluation.slow_flow_samplers=[{inside}]", "evaluation.primary=fd_digits/euler8-from0.001-to0.999/s1",
    ]  # fmt: skip
    standard = "{time_law: uniform, slowing_law: interval, gamma: 0, target_time: m, interval: [0.001, 0.999]}"
    narrow = ["mixture.interval=[0.001, 0.999]", f"base.mixture={standard}", f"arms.standard.mixture={standard}"]
    assert load("quickstart", [*given, *narrow]).weighting == "velocity"
    with pytest.raises(ValueError, match=r"must keep its target's time inside \(0, 1\) where weighting is velocity"):
        load("quickstart", given)
    with pytest.raises(ValueError, match=r"arms.mixflow.mixture must keep .* and gamma 1.0; narrow interval, lower"):
        load("quickstart", [*given, *narrow, "mixture.gamma=1.0"])
