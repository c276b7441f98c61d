"""The doctor: judgement on made-up probes, the probes themselves on this machine."""

import importlib.metadata
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from tersor.analyse.doctor import (
    MINIMUM_VERSIONS,
    Doctor,
    Finding,
    Gpu,
    Probes,
    diagnose,
    parse_smi,
    probe,
)
from tersor.core.jsonable import from_json, to_json
from tersor.core.machine import Machine, describe_machine
from tersor.core.records import BackendInfo, FormatInfo

ROOT = Path(__file__).parents[3]
MACHINE = Machine(
    processor="Example CPU",
    architecture="x86_64",
    features=("avx2", "avx512_vnni"),
    cores=2,
    memory_bytes=8 * 2**30,
    system="Linux 6",
    python="3.11.7",
)
COMPLETE = {name: ".".join(str(n) for n in v) for name, v in MINIMUM_VERSIONS.items()}
OPENVINO = BackendInfo(
    name="openvino",
    available=True,
    version="2026.4.1",
    precisions=("f32",),
    formats=(FormatInfo(name="f32"), FormatInfo(name="int8", weight_limit=63)),
)


def judged(**changes: object) -> Doctor:
    probes = Probes(**{"packages": COMPLETE, **changes})  # type: ignore[arg-type]
    return diagnose([OPENVINO], MACHINE, probes=probes)


def finding(doctor: Doctor, name: str, group: str | None = None) -> Finding:
    (found,) = [f for f in doctor.findings if f.name == name and group in (None, f.group)]
    return found


def test_minimum_versions_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in extras.values() for line in extra)]
    wanted = {}
    for line in lines:
        match = re.fullmatch(r"([\w-]+)>=([\d.]+)", line)
        if match and match.group(1) in MINIMUM_VERSIONS:
            wanted[match.group(1)] = tuple(int(n) for n in match.group(2).split("."))
    assert wanted == MINIMUM_VERSIONS


def test_with_everything_there_it_runs_and_compresses() -> None:
    doctor = judged()
    assert (doctor.run_on, doctor.compress_on) == (("openvino",), ("openvino",))
    assert all(finding(doctor, name, "packages").status == "ok" for name in MINIMUM_VERSIONS)
    assert finding(doctor, "openvino", "backends").found == "2026.4.1 on cpu: f32, int8"


def test_record_reads_back_from_json() -> None:
    doctor = judged()
    assert from_json(Doctor, to_json(doctor)) == doctor


def test_without_torch_artifacts_run_but_nothing_compresses() -> None:
    doctor = judged(packages={**COMPLETE, "torch": None})
    assert (doctor.run_on, doctor.compress_on) == (("openvino",), ())
    torch = finding(doctor, "torch")
    assert torch.status == "missing"
    assert torch.remedy == "pip install 'tersor[compress]' (torch>=2.11)"


@pytest.mark.parametrize(
    ("version", "status"),
    [("2.10.1", "problem"), ("2.11.0", "ok"), ("2.13.0+cpu", "ok"), ("odd", "problem")],
)
def test_an_old_package_is_a_problem(version: str, status: str) -> None:
    doctor = judged(packages={**COMPLETE, "torch": version})
    assert finding(doctor, "torch").status == status
    assert bool(doctor.compress_on) == (status == "ok")


def test_an_unavailable_backend_brings_its_reason_and_remedy() -> None:
    info = BackendInfo(name="trt", available=False, reason="no GPU", remedy="add one")
    doctor = diagnose([info], MACHINE, probes=Probes(packages=COMPLETE))
    found = finding(doctor, "trt")
    assert (found.status, found.found, found.remedy) == ("problem", "no GPU", "add one")
    assert (doctor.run_on, doctor.compress_on) == ((), ())


def test_processor_abilities_follow_the_features() -> None:
    doctor = judged()
    assert finding(doctor, "int8 dot products (vnni)").found == "avx512_vnni"
    assert finding(doctor, "bf16 products").status == "missing"


def test_other_architectures_are_not_measured_by_intels_list() -> None:
    arm = Machine(**{**to_json(MACHINE), "architecture": "aarch64", "features": ("asimddp",)})
    doctor = diagnose([], arm, probes=Probes(packages=COMPLETE))
    groups = [f for f in doctor.findings if f.group == "processor"]
    assert [f.found for f in groups][1:] == ["asimddp"]


def test_old_python_is_a_problem() -> None:
    old = Machine(**{**to_json(MACHINE), "features": (), "python": "3.10.2"})
    found = finding(diagnose([], old, probes=Probes(packages=COMPLETE)), "python")
    assert (found.status, found.remedy) == ("problem", "use Python 3.11 or newer")


def test_smi_lines_are_read() -> None:
    text = "NVIDIA H100, PCIe, 580.1, 81559 MiB\nnot a row\n"
    assert parse_smi(text) == (Gpu(name="NVIDIA H100, PCIe", driver="580.1", memory="81559 MiB"),)


def test_smi_lines_with_a_capability_are_read() -> None:
    (found,) = parse_smi("NVIDIA H200, 580.82, 143771 MiB, 9.0\n")
    assert found == Gpu(name="NVIDIA H200", driver="580.82", memory="143771 MiB", capability="9.0")


def test_an_old_nvidia_smi_is_asked_for_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text(
        "#!/bin/sh\ncase $1 in *compute_cap*) exit 2;; esac\necho 'K80, 450.1, 11441 MiB'\n",
        encoding="utf-8",
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert probe().gpus == (Gpu(name="K80", driver="450.1", memory="11441 MiB"),)


def on_gpu(capability: str = "9.0", driver: str = "580.82", **changes: object) -> Doctor:
    gpu = Gpu(name="Card", driver=driver, memory="80 GiB", capability=capability)
    usual = {"torch_cuda": "13.0", "torch_cudnn": "91400", "torch_sees_gpu": True, "triton": "3.6"}
    return judged(**{"gpus": (gpu,), "has_nvidia_smi": True, **usual, **changes})


@pytest.mark.parametrize(
    ("capability", "able"),
    [
        ("9.0", "fp16, int8, bf16, fp8"),
        ("8.0", "fp16, int8, bf16"),
        ("7.0", "fp16"),
        ("6.1", "none"),
    ],
)
def test_a_capability_says_what_a_card_computes_in(capability: str, able: str) -> None:
    found = finding(on_gpu(capability), "compute capability of Card")
    assert (found.status, found.found) == ("ok", f"{capability}; tensor cores: {able}")


@pytest.mark.parametrize(
    ("capability", "architectures", "status"),
    [
        ("9.0", ("sm_80", "sm_90"), "ok"),
        ("8.9", ("sm_80", "sm_90"), "ok"),
        ("7.5", ("sm_80", "sm_90"), "problem"),
        ("8.0", ("sm_86",), "problem"),
        ("12.0", ("sm_90", "compute_90"), "ok"),
        ("12.0", ("sm_90", "sm_120"), "ok"),
        ("10.0", ("sm_90",), "problem"),
    ],
)
def test_torch_must_have_code_for_the_card(
    capability: str, architectures: tuple[str, ...], status: str
) -> None:
    doctor = on_gpu(capability, torch_architectures=architectures)
    assert finding(doctor, "compute capability of Card").status == status


@pytest.mark.parametrize(
    ("cuda", "driver", "status"),
    [
        ("13.0", "580.82", "ok"),
        ("13.0", "575.51", "problem"),
        ("12.8", "525.60", "ok"),
        ("", "450.1", "ok"),
    ],
)
def test_a_driver_that_is_too_old_for_torchs_cuda(cuda: str, driver: str, status: str) -> None:
    found = finding(on_gpu(driver=driver, torch_cuda=cuda), "driver")
    assert found.status == status
    assert bool(found.remedy) == (status == "problem")


def test_torch_that_can_not_use_the_gpu_is_a_problem() -> None:
    found = finding(on_gpu(torch_sees_gpu=False), "CUDA in torch")
    assert found.status == "problem"
    assert "CUDA_VISIBLE_DEVICES" in found.remedy


def test_torch_without_cudnn_is_a_problem() -> None:
    assert finding(on_gpu(torch_cudnn=""), "CUDA in torch").status == "problem"


@pytest.mark.parametrize(
    ("triton", "capability", "status"),
    [("3.6", "9.0", "ok"), (None, "9.0", "missing"), ("3.6", "6.1", "problem"), ("3.6", "", "ok")],
)
def test_triton_beside_a_card(triton: str | None, capability: str, status: str) -> None:
    assert finding(on_gpu(capability, triton=triton), "Triton").status == status


def test_triton_is_nobodys_business_without_a_card() -> None:
    assert not [f for f in judged().findings if f.name == "Triton"]


@pytest.mark.parametrize(("compiler", "status"), [("g++", "ok"), ("", "missing")])
def test_a_compiler_is_looked_for(compiler: str, status: str) -> None:
    assert finding(judged(compiler=compiler), "C++ compiler").status == status


def test_a_gpu_with_a_cpu_build_of_torch_is_a_problem() -> None:
    gpu = Gpu(name="H100", driver="580.1", memory="81559 MiB")
    doctor = judged(packages={**COMPLETE, "torch": "2.13.0+cpu"}, gpus=(gpu,), has_nvidia_smi=True)
    assert finding(doctor, "driver").found == "H100, 81559 MiB, driver 580.1"
    assert finding(doctor, "CUDA in torch").status == "problem"


@pytest.mark.parametrize(
    ("changes", "status", "found"),
    [
        ({"torch_cuda": "13.0", "torch_cudnn": "91400"}, "ok", "CUDA 13.0, cuDNN 91400"),
        ({"torch_asked": True}, "missing", "torch 2.11 is a CPU build"),
        ({"torch_problem": "ImportError: lib"}, "problem", "torch 2.11: ImportError: lib"),
        ({}, "ok", "torch 2.11; not asked for its CUDA"),
    ],
)
def test_what_torch_says_of_cuda(changes: dict[str, object], status: str, found: str) -> None:
    answer = finding(judged(**changes), "CUDA in torch")
    assert (answer.status, answer.found) == (status, found)


def test_a_wedged_driver_is_a_problem() -> None:
    found = finding(judged(has_nvidia_smi=True, gpu_problem="no answer"), "driver")
    assert (found.status, found.found) == ("problem", "no answer")


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("echo 'H100, 580.1, 81559 MiB'", ""),
        ("echo 'driver mismatch' >&2; exit 9", "nvidia-smi exit 9: driver mismatch"),
    ],
)
def test_nvidia_smi_is_really_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, problem: str
) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    seen = probe()
    assert seen.has_nvidia_smi
    assert seen.gpu_problem == problem
    assert len(seen.gpus) == (0 if problem else 1)


def test_a_silent_nvidia_smi_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\nexec sleep 60\n", encoding="utf-8")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr("tersor.analyse.doctor._SMI_SECONDS", 0.2)
    assert probe().gpu_problem == "nvidia-smi gave no answer in 0 s"


def test_no_nvidia_smi_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    doctor = diagnose([], MACHINE, probes=probe())
    assert finding(doctor, "driver").status == "missing"


def test_probe_reads_the_installed_versions() -> None:
    assert probe().packages["numpy"] == importlib.metadata.version("numpy")


def test_diagnose_runs_on_this_machine() -> None:
    doctor = diagnose([OPENVINO], describe_machine())
    assert {f.group for f in doctor.findings} == {
        "processor",
        "python",
        "packages",
        "nvidia",
        "backends",
    }
    assert finding(doctor, "numpy").status == "ok"
    assert from_json(Doctor, to_json(doctor)) == doctor


def test_torch_is_asked_only_on_request() -> None:
    import sys

    code = (
        "import sys\nfrom tersor.analyse.doctor import probe\n"
        "probe()\nprint('torch' in sys.modules)\n"
        "seen = probe(import_torch=True)\nprint('torch' in sys.modules, seen.torch_asked)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100
    )
    assert done.stdout.split() == ["False", "True", "True"]
