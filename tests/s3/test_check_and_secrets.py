"""What a user sees when S3 does not answer as hoped, and that nothing of the credentials is written anywhere."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.support.s3 import BUCKET, S3, free_ports
from tests.support.s3_runs import SHORT, program, together, write_raw_events, write_recipe

pytestmark = pytest.mark.s3
BASE = f"s3://{BUCKET}/secrets"


@pytest.fixture(scope="module")
def finished(s3, tmp_path_factory) -> list[str]:
    """What every program said that worked on `BUCKET/secrets`; the check comes first."""
    folder = tmp_path_factory.mktemp("secrets")
    write_raw_events(folder / "raw")
    (folder / "in.jsonl").write_text(json.dumps({"items": ["p3"]}) + "\n")
    s3.files().put(f"{folder}/", f"{BUCKET}/secrets/", recursive=True)
    recipe = folder / "recipe.yaml"
    write_recipe(recipe, f"{BASE}/raw", f"{BASE}/data")
    places = (f"data={BASE}/data", f"run_dir={BASE}/run")
    first = [
        program("-m", "data_prep", "--config", recipe, 'input.files=["event*.csv"]', environment=s3.environment),
        program("train.py", *places, *SHORT, "max_epochs=1", environment=s3.environment),
    ]
    then = (
        ("train.py", "--check", *places, *SHORT),
        ("-m", "gru4recf_dist.evaluate", "--run", f"{BASE}/run"),
        (
            "-m",
            "gru4recf_dist.recommend",
            "--run",
            f"{BASE}/run",
            "--input",
            f"{BASE}/in.jsonl",
            "--output",
            f"{BASE}/o",
        ),
    )
    done = [*together((arguments, s3.environment) for arguments in then), *first]
    assert [each.returncode for each in done] == [0] * 5, "\n".join(each.stderr for each in done)
    return [each.stdout + each.stderr for each in done]


def test_credentials_and_endpoint_are_in_no_file_and_no_output(finished, s3):
    places = {f"output {number}": text.encode() for number, text in enumerate(finished)}
    files = s3.files()
    written = {name.removeprefix(f"{BUCKET}/secrets/") for name in files.find(f"{BUCKET}/secrets")}
    assert {"run/config.yaml", "run/result.json", "run/metrics.jsonl", "data/manifest.json", "o"} <= written
    assert any("tensorboard" in name for name in written) and any("checkpoints" in name for name in written)
    places |= {name: files.cat_file(f"{BUCKET}/secrets/{name}") for name in written}
    for place, content in places.items():
        for secret in (s3.key, s3.secret, s3.endpoint.removeprefix("http://")):
            assert secret.encode() not in content, (place, secret)


def test_check_accepts_what_is_there(finished):
    assert finished[0].startswith("ok: shop, 30 items, 90 training sessions") and finished[0].count("\n") == 1


@pytest.fixture(scope="module")
def refused(s3, finished, tmp_path_factory) -> dict[tuple[str, str], subprocess.CompletedProcess]:
    """How `train.py --check` and the preparation end, by what is wrong."""
    folder = tmp_path_factory.mktemp("refused")
    wrong = {
        "no data": (f"s3://{BUCKET}/nowhere", s3),
        "no bucket": ("s3://nowhere", s3),
        "secret": (BASE, S3(s3.endpoint, s3.key, "not-the-secret")),
        "key": (BASE, S3(s3.endpoint, "not-a-key", s3.secret)),
        "endpoint": (BASE, S3(f"http://127.0.0.1:{free_ports(1)[0]}", s3.key, s3.secret)),
    }
    runs = {}
    for name, (base, given) in wrong.items():
        recipe = folder / f"{name}.yaml".replace(" ", "-")
        write_recipe(recipe, f"{base}/raw", str(folder / "data"))
        # A pattern is a request of another kind than a name.
        pattern = ('input.files=["*.csv"]',) if name == "endpoint" else ()
        runs["data_prep", name] = ("-m", "data_prep", "--config", recipe, *pattern), given.environment
        # The store says the same of a wrong key as of a wrong secret.
        if name not in ("no bucket", "key"):
            check = ("train.py", "--check", f"data={base}/data", f"run_dir={folder}/run")
            runs["train", name] = check, given.environment
    # How often an endpoint that does not answer is asked is tested elsewhere, without its pauses.
    runs = {name: ((*command, "storage.attempts=1"), given) for name, (command, given) in runs.items()}
    done = dict(zip(runs, together(runs.values()), strict=True))
    assert not (folder / "run").exists() and not (folder / "data").exists()
    return done


@pytest.mark.parametrize(
    ("program_name", "wrong"),
    [
        *(("train", wrong) for wrong in ("no data", "secret", "endpoint")),
        *(("data_prep", wrong) for wrong in ("no data", "no bucket", "secret", "key", "endpoint")),
    ],
)
def test_what_is_wrong_is_one_line_that_names_the_place(refused, s3, program_name, wrong):
    done = refused[program_name, wrong]
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    place = {"no data": f"s3://{BUCKET}/nowhere/", "no bucket": "s3://nowhere/"}.get(wrong, f"{BASE}/")
    assert place in done.stderr, done.stderr
    if wrong in ("secret", "key", "endpoint"):
        # Data that cannot be asked for is not data that is missing.
        assert "no such file" not in done.stderr and "no prepared data set" not in done.stderr
    for secret in (s3.key, s3.secret, "not-the-secret", "not-a-key"):
        assert secret not in done.stderr
