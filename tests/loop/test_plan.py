"""`--plan` as a user runs it, and the flag files whose comments it writes."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from experiments import configs, run_folder, settings
from experiments.annotate_flags import annotated
from experiments.plan import make_plan
from experiments.plan_tables import hours
from experiments.planned_data import planned_data, sample_sizes
from lever_jax.errors import InputError as PolicyError
from qwen_bridge.devices import DEVICES
from qwen_bridge.errors import InputError
from qwen_bridge.shape import PUBLISHED

ROOT = pathlib.Path(__file__).parents[2]
FLAG_FILES = sorted((ROOT / "experiments" / "flags").glob("*.flags"))
OKVQA = f"--flagfile={ROOT / 'experiments' / 'flags' / 'okvqa_3b_1gpu.flags'}"


@pytest.fixture(autouse=True)
def own_flags():
    """Every test sets flags of its own."""
    with flagsaver.flagsaver():
        yield


def plan(*given, phases="train", **options):
    with flagsaver.flagsaver():
        flags.FLAGS(["train", *given])
        return make_plan(phases, **options)


def test_all_flag_files_are_there():
    names = [
        f"{data}_{size}_{gpus}gpu"
        for data in ("okvqa", "vqav2")
        for size in ("3b", "7b")
        for gpus in (1, 8)
    ]
    assert [file.stem for file in FLAG_FILES] == sorted([*names, "jsonl_3b_8gpu"])


@pytest.mark.parametrize("file", FLAG_FILES, ids=lambda file: file.stem)
def test_comments_of_flag_files_are_what_plan_says_today(file):
    assert annotated(file) == file.read_text(), "run python -m experiments.annotate_flags"
    flags.FLAGS(["train", f"--flagfile={file}"])
    configs.check()
    data, size, gpus = file.stem.split("_")
    assert settings.WORKERS.value == int(gpus.removesuffix("gpu"))
    assert f"-{size.upper()}-" in settings.MODEL.value
    if data != "jsonl":  # whose numbers are the user's
        assert settings.PLAN_BANK.value == {"okvqa": 9_009, "vqav2": 443_757}[data]
        val = {"okvqa": 5_046, "vqav2": 214_354}[data]
        assert settings.NUM_QUERIES.value + settings.NUM_EVAL.value <= val
    document = make_plan()
    assert document["memory"]["fits"]
    assert 144 <= document["prompt"]["image"] <= 256


def test_a_config_alone_is_enough(shared, tmp_path):
    """No weights, no data, no worker: and nothing is made."""
    folder, workdir, out = tmp_path / "model", tmp_path / "run", tmp_path / "plan.json"
    folder.mkdir()
    shutil.copy(shared / "qwen2_5_vl" / "config_3b.json", folder / "config.json")
    command = [sys.executable, "-m", "experiments.train", OKVQA, "--plan", f"--model={folder}"]
    run = subprocess.run(
        [*command, f"--workdir={workdir}", f"--plan_out={out}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "a prediction, nothing was run" in run.stdout
    for words in ("GRPO rounds", "mining, stage A", "35% of peak", "none seen in", "memory a GPU"):
        assert words in run.stdout
    assert not workdir.exists()
    written = json.loads(out.read_text())
    known = plan(OKVQA)
    assert written["total"] == known["total"]
    assert written["memory"] == known["memory"]


def test_the_two_published_models_need_no_folder():
    totals = [plan(OKVQA, f"--model={name}")["total"]["flops"][1] for name in PUBLISHED]
    assert 1.8 < totals[1] / totals[0] < 3


def test_hours_follow_workers_utilisation_and_device():
    base = plan(OKVQA)["total"]["hours"]
    assert plan(OKVQA, "--workers=4")["total"]["hours"] == pytest.approx([h / 4 for h in base])
    half = plan(OKVQA, "--plan_utilisation=0.175")["total"]["hours"]
    assert half[0] == pytest.approx(2 * base[0])
    slower = plan(OKVQA, "--plan_device=a100")["total"]["hours"][0] / base[0]
    assert slower == pytest.approx(DEVICES["h100"].flops / DEVICES["a100"].flops)


def test_caches_take_what_the_device_has_left():
    auto = ("--cache_mib=auto", "--vision_cache_mib=auto", "--plan_device=h200")
    fixed, free = (plan(OKVQA, *given)["memory"] for given in ((auto[2],), auto))
    assert free["fits"]
    assert free["parts"]["prefix_cache"] > 8 * fixed["parts"]["prefix_cache"]
    assert free["total"] < 0.95 * free["device"]
    small = plan(OKVQA, *auto[:2], "--plan_device=l4")["memory"]
    assert 0 < small["parts"]["prefix_cache"] < fixed["parts"]["prefix_cache"]


def test_more_certified_answers_cost_less():
    few, many = (plan(OKVQA, f"--plan_certified={share}")["total"] for share in (0, 1))
    assert many["generated"] == 0
    assert few["generated"] > 0
    assert few["hours"][1] > many["hours"][1]
    assert few["hours"][0] == many["hours"][0]


def test_mining_alone_is_the_first_part():
    whole, mining = plan(OKVQA), plan(OKVQA, phases="mine")
    count = len(mining["phases"])
    assert mining["phases"] == whole["phases"][:count]
    assert "picks of RCE" not in [row["name"] for row in mining["phases"]]


def test_an_evaluation_alone_is_the_last_part_and_may_be_known_already():
    last = plan(OKVQA)["phases"][-1]  # warm-up, RCE, GRPO
    alone = plan(OKVQA, phases="evaluate", selectors=3)
    assert [row["name"] for row in alone["phases"]] == ["evaluation"]
    assert alone["phases"][0] == {
        **last, "scored": [0, last["scored"][1]], "flops": alone["total"]["flops"],
        "hours": alone["total"]["hours"],
    }  # fmt: skip
    assert alone["total"]["hours"][0] < last["hours"][0]
    assert alone["total"]["hours"][1] == last["hours"][1]
    fewer = plan(OKVQA, phases="evaluate", selectors=1)
    assert fewer["total"]["asked"] < alone["total"]["asked"]


def test_the_plain_scorer_costs_many_times_as_much():
    fast, plain = (plan(OKVQA, f"--scorer={name}") for name in ("trie", "reference"))
    assert plain["total"]["scored"] == fast["total"]["scored"]
    assert 5 < plain["total"]["flops"][1] / fast["total"]["flops"][1] < 30


def test_the_main_job():
    document = plan(f"--flagfile={ROOT / 'grpo.flags'}")
    assert document["total"]["asked"] == [142_700, 145_100]
    assert document["prompt"]["image"] == 1
    assert document["assumptions"]["bank"] == 1600


def test_real_files_are_counted_and_images_sampled(shared):
    mini = shared / "vqav2_mini"
    flags.FLAGS(
        [
            "train",
            "--dataset=official",
            f"--bank_questions={mini / 'bank_questions.json'}",
            f"--bank_images={mini / 'train2014'}",
        ]
    )
    data = planned_data()
    questions = json.loads((mini / "bank_questions.json").read_text())["questions"]
    assert data.bank == len(questions) == 340
    assert data.bank_images == len({question["image_id"] for question in questions})
    assert len(data.image_sizes) == 64
    assert {max(size) for size in data.image_sizes} <= set(range(280, 337))
    flags.FLAGS(["train", "--max_bank=100"])
    assert (planned_data().bank, planned_data().bank_images) == (100, 100)


def test_jsonl_is_counted(tmp_path):
    Image.new("RGB", (50, 40)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    lines = [{"image": name, "question": "?", "answers": ["x"]} for name in ("a.png", "a.png")]
    file = tmp_path / "bank.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    flags.FLAGS(["train", "--dataset=jsonl", f"--bank_jsonl={file}", "--plan_bank=900"])
    data = planned_data()  # --plan_bank is for a file that is not there
    assert (data.bank, data.bank_images, data.image_sizes) == (2, 1, ((50, 40),))
    assert "a bank of 2, counted in" in data.assumptions[0]
    assert sample_sizes(tmp_path / "nothing") == ()


@pytest.mark.parametrize("text", ["not JSON", "[]", "{}", '{"image": 3}', "[" * 100_000])
def test_a_line_that_cannot_be_counted_is_named(tmp_path, text):
    file = tmp_path / "bank.jsonl"
    file.write_text(f'{{"image": "a.png"}}\n\n{text}\n')
    flags.FLAGS(["train", "--dataset=jsonl", f"--bank_jsonl={file}"])
    with pytest.raises(PolicyError, match=r"--bank_jsonl=.*\.jsonl:3 is no example.*check_data"):
        planned_data()


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (["--dataset=official", "--model=embedded"], PolicyError, "give --plan_bank=N"),
        (["--model=/no/such/folder"], PolicyError, "--model=/no/such/folder is not a folder"),
        (["--max_pixels=784", "--min_pixels=900"], InputError, "--min_pixels=900 exceeds"),
    ],
)
def test_plans_that_cannot_be_made(given, error, words):
    with pytest.raises(error, match=words):
        plan(*given)


def test_a_run_does_not_keep_the_flags_of_a_plan():
    assert not [name for name in run_folder.own_flags() if name.startswith("plan")]


def test_hours_in_words():
    assert [hours(h) for h in (123.4, 9.94, 0.1, 0.05, 0.001)] == [
        "123 h", "9.9 h", "0.1 h", "3.0 min", "4 s",
    ]  # fmt: skip


def test_a_run_that_is_there_has_settled_its_data_and_model(tmp_path):
    """So that runs which are older than these checks can be evaluated and resumed."""
    flags.FLAGS(
        ["train", "--dataset=jsonl", "--bank_jsonl=b", "--query_jsonl=q", f"--workdir={tmp_path}"]
    )
    with pytest.raises(PolicyError, match="--dataset=jsonl needs --model"):
        configs.check()
    configs.check(scoring=False)
    (tmp_path / "flags.txt").touch()
    configs.check()
