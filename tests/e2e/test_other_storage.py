"""gs:// and abfs:// through preparation, training and recommendation, by fsspec's file system in memory.

It takes the way that these URLs take through the project, not that through their clients.
"""

from __future__ import annotations

import json

import pytest

from tests.e2e.test_main_job import SIZES, program

pytestmark = pytest.mark.e2e

# What is in memory is gone with its process: all three programs run in one.
_IN_MEMORY = """
import json, sys
import fsspec
from fsspec.implementations.memory import MemoryFileSystem
from data_prep.__main__ import main as prepare
from gru4recf_dist import recommend, train

protocol, base, sizes = sys.argv[1], sys.argv[2], sys.argv[3:]


class Bucket(MemoryFileSystem):
    # One of its own, in which a path that lost its protocol finds nothing.
    protocol = (protocol,)
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace(f"{protocol}://", "memory://"))


fsspec.register_implementation(protocol, Bucket, clobber=True)
files = fsspec.filesystem(protocol)
rows = [f"u{user},p{(user + step) % 30},{step}" for user in range(60) for step in range(6)]
files.pipe(f"{base}/raw/events-1.csv", "\\n".join(["session_id,item_id,timestamp", *rows]).encode())
files.pipe(f"{base}/in.jsonl", b'{"items": ["p3", "p4"]}\\n')
recipe = ["name=shop", f"source={base}/raw", f"output={base}/data", "input.format=csv", 'input.files=["events-*.csv"]']
assert prepare(recipe) == 0
assert train.main([f"data={base}/data", f"run_dir={base}/run", *sizes]) == 0
places = ["--run", f"{base}/run", "--input", f"{base}/in.jsonl", "--output", f"{base}/out.jsonl"]
assert recommend.main(places) == 0
found = {name: files.cat_file(name).decode("latin-1") for name in files.find(base)}
print("\\n" + json.dumps({"found": sorted(found), "out": found[f"{Bucket._strip_protocol(base)}/out.jsonl"]}))
"""


@pytest.mark.parametrize("base", ["gs://bucket/a", "abfs://container@account.dfs.core.windows.net/a"])
def test_the_whole_path(base):
    sizes = [*SIZES, "max_epochs=2", "model.fusion=item_only"]
    done = program("-c", _IN_MEMORY, base.partition(":")[0], base, *sizes)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    for name in ("data/manifest.json", "run/config.yaml", "run/result.json", "out.jsonl"):
        assert any(found.endswith(f"/a/{name}") for found in result["found"]), result["found"]
    assert len(json.loads(result["out"])["items"]) == 20
