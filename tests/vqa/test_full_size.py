"""The whole of VQAv2, synthesised at its true size: how long it takes to load, in how much memory.

The strings are harder than the real ones: every question is unique, and so are two million
answers, so that storing equal strings once saves less than it does on the real files.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIZES = {"bank": 443_757, "query": 214_354}  # train2014 and val2014
SUBTYPES = {"bank": "train2014", "query": "val2014"}
FIRST_IMAGE = {"bank": 1, "query": 300_000}
MAX_SECONDS, MAX_GIB = 60, 4

# In a process of its own, as peak memory is a process's. The loader is one thread and reads from
# the page cache: seconds of CPU are what the wall clock shows on a core that is not shared.
LOAD = """
import json, resource, sys, time
from qwen_bridge.vqa.sources import open_dataset

settings = {"kind": "official"} | json.loads(sys.argv[1])
wall, cpu = time.perf_counter(), time.process_time()
data = open_dataset(settings)
print(json.dumps({
    "wall_s": time.perf_counter() - wall,
    "cpu_s": time.process_time() - cpu,
    "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    "sizes": [len(data.bank), len(data.train), len(data.eval)],
    "answers": sum(len(example.answers) for example in data.bank),
    "last": [data.bank[-1].id, data.bank[-1].image, data.bank[-1].question],
    "shared_images": len({one.image for one in data.train} & {one.image for one in data.eval}),
}))
"""


def write_split(folder, role):
    """Writes a split in the official format, field for field, at 5.5 questions an image."""
    head = f'{{"info": {{}}, "data_type": "mscoco", "data_subtype": "{SUBTYPES[role]}", "license": '
    paths = {what: folder / f"{role}_{what}.json" for what in ("questions", "annotations")}
    with paths["questions"].open("w") as asked, paths["annotations"].open("w") as annotated:
        asked.write(head + '{}, "task_type": "Open-Ended", "questions": [')
        annotated.write(head + '{}, "annotations": [')
        for row in range(SIZES[role]):
            image_id = FIRST_IMAGE[role] + row * 2 // 11
            ids = f'"image_id": {image_id}, "question_id": {image_id * 1000 + row % 11}'
            common = f"answer {row % 30_000}"
            answers = ", ".join(
                f'{{"answer": "{common if number < 7 else f"{number} of {row}"}", '
                f'"answer_confidence": "yes", "answer_id": {number}}}'
                for number in range(1, 11)
            )
            comma = ", " if row else ""
            asked.write(f'{comma}{{{ids}, "question": "What is beside thing number {row} here?"}}')
            annotated.write(
                f'{comma}{{{ids}, "question_type": "what is", "answer_type": "other", '
                f'"multiple_choice_answer": "{common}", "answers": [{answers}]}}'
            )
        asked.write("]}")
        annotated.write("]}")
    return {f"{role}_{what}": str(path) for what, path in paths.items()}


@pytest.mark.slow
def test_full_size_vqav2_loads_in_a_minute_and_four_gib():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = write_split(folder, "bank") | write_split(folder, "query")
        settings |= {"bank_images": name, "query_images": name}
        settings |= {"num_train": 50_000, "num_eval": 5_000, "seed": 0}
        run = subprocess.run(
            [sys.executable, "-c", LOAD, json.dumps(settings)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    print(result)
    assert result["sizes"] == [SIZES["bank"], 50_000, 5_000]
    assert result["answers"] == 10 * SIZES["bank"]
    last = SIZES["bank"] - 1
    image_id = FIRST_IMAGE["bank"] + last * 2 // 11
    assert result["last"] == [
        image_id * 1000 + last % 11,
        f"bank/COCO_train2014_{image_id:012d}.jpg",
        f"What is beside thing number {last} here?",
    ]
    assert result["shared_images"] == 0
    assert result["cpu_s"] <= MAX_SECONDS
    assert result["peak_gib"] <= MAX_GIB
