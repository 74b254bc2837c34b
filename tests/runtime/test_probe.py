# SPDX-License-Identifier: Apache-2.0
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from onnxpress.contracts.errors import InputError
from onnxpress.runtime.probe import command, main, read_inputs


def test_round_trip_in_a_fresh_process(tiny: Path, feeds: dict[str, np.ndarray], tmp_path: Path) -> None:
    np.savez(tmp_path / "inputs.npz", **feeds)
    line = command(tiny, tmp_path / "inputs.npz", threads=1)
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    printed = json.loads(done.stdout)
    assert set(printed) == {"load_ms", "peak_rss_mb"}
    assert printed["load_ms"] > 0
    assert 10 < printed["peak_rss_mb"] < 2000


@pytest.mark.skipif(sys.platform != "linux", reason="about a Linux counter")
def test_memory_of_the_parent_is_not_counted() -> None:
    """ru_maxrss survives fork and exec; the memory of the process that starts a probe must not be reported as its."""
    ballast = np.ones(400 << 20, dtype=np.uint8)
    code = "from onnxpress.runtime.probe import peak_rss_mib; print(peak_rss_mib())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < ballast.nbytes / 2**20


def test_inputs_from_each_format(tmp_path: Path, feeds: dict[str, np.ndarray]) -> None:
    np.savez(tmp_path / "a.npz", **feeds)
    save_file(feeds, tmp_path / "b.safetensors")
    golden = {f"{i}/{name}": array + i for i in range(2) for name, array in feeds.items()}
    save_file(golden, tmp_path / "golden.safetensors")
    for name in ("a.npz", "b.safetensors", "golden.safetensors"):
        found = read_inputs(tmp_path / name)
        assert set(found) == set(feeds)
        assert all(np.array_equal(found[key], feeds[key]) for key in feeds)


@pytest.mark.parametrize("name", ["absent.npz", "garbage.npz", "array.npz", "garbage.safetensors", "other.txt"])
def test_inputs_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "garbage.npz").write_bytes(b"PK\x03\x04garbage")
    (tmp_path / "garbage.safetensors").write_bytes(b"garbage")
    (tmp_path / "other.txt").write_text("x")
    with open(tmp_path / "array.npz", "wb") as file:
        np.save(file, np.zeros(2))
    with pytest.raises(InputError, match=name):
        read_inputs(tmp_path / name)


def test_errors_are_one_line_with_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["absent.onnx", "--inputs", str(tmp_path / "absent.npz")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
