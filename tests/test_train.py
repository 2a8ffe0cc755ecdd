"""The trainer as a program: it is killed, stopped, continued, refused, and spread over devices."""

import json
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import environment
from etils import epath

from contrastive_jax import inference
from contrastive_jax.config import UserError
from contrastive_jax.workdir import records

ROOT = pathlib.Path(__file__).parents[1]
TINY = [
    '--config=configs/simclr_vit.py',
    '--config.total_steps=12',
    '--config.batch_size=16',
    '--config.log_every=1',
    '--config.eval_every=0',
    '--config.checkpoint_every=3',
    '--config.model.width=16',
    '--config.model.depth=1',
    '--config.model.heads=2',
    '--config.model.patch=4',
    '--config.method.hidden=16',
    '--config.method.projection=8',
    '--config.evals={}',
]


def start(workdir, *flags, devices=1, tiny=TINY):
    return subprocess.Popen(
        [sys.executable, '-m', 'contrastive_jax.main', *tiny, f'--workdir={workdir}', *flags],
        cwd=ROOT,
        env=environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, code=0):
    out, _ = process.communicate(timeout=300)
    assert process.returncode == code, out
    return out


def losses(workdir):
    """Loss of each step, which is there exactly once."""
    found = [r for r in records.read(workdir) if 'train/loss' in r]
    steps = [r['step'] for r in found]
    assert steps == list(range(1, len(steps) + 1))
    return [r['train/loss'] for r in found]


def parameters(workdir):
    """Every array of the newest checkpoint, by name."""
    import orbax.checkpoint as ocp

    steps = [p for p in (pathlib.Path(workdir) / 'checkpoints').iterdir() if p.name.isdigit()]
    newest = epath.Path(max(steps, key=lambda p: int(p.name))) / 'state'
    handler = ocp.PyTreeCheckpointHandler()
    # As NumPy arrays, whatever devices wrote them.
    how = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(newest).tree
    )
    tree = handler.restore(newest, args=ocp.args.PyTreeRestore(restore_args=how))
    handler.close()
    return {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(tree)}


def assert_same_bits(a, b):
    assert losses(a) == losses(b)
    one, other = parameters(a), parameters(b)
    assert one.keys() == other.keys()
    for key in one:
        assert np.array_equal(np.asarray(one[key]), np.asarray(other[key])), key


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A run that nothing interrupts."""
    workdir = tmp_path_factory.mktemp('whole')
    finish(start(workdir))
    return workdir


def wait_for(workdir, lines):
    """Returns once metrics.jsonl has that many lines."""
    path = pathlib.Path(workdir) / 'metrics.jsonl'
    for _ in range(3000):
        if path.exists() and path.read_text().count('\n') >= lines:
            return
        time.sleep(0.02)
    raise AssertionError('the run wrote no metrics')


def kill(workdir, lines, tiny=TINY):
    """Starts a run and kills it once metrics.jsonl has that many lines."""
    process = start(workdir, tiny=tiny)
    wait_for(workdir, lines)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_killed_run_goes_on_with_the_same_bits(whole, tmp_path):
    kill(tmp_path, 8)
    out = finish(start(tmp_path))
    assert 'continuing' in out or 'untrained' in out
    assert_same_bits(whole, tmp_path)


def test_a_run_that_clusters_between_epochs_goes_on_with_the_same_bits(tmp_path):
    """Killed after the first epoch: queue, target network and clusters come from the checkpoint."""
    tiny = [
        '--config=configs/pcl.py',
        '--config.total_steps=24',
        '--config.batch_size=128',
        '--config.log_every=1',
        '--config.checkpoint_every=8',
        '--config.model.widths=(8,16)',
        '--config.method.hidden=16',
        '--config.method.projection=8',
        '--config.method.clusters=(4,8)',
        '--config.method.warmup=0.0',
        '--config.evals={}',
    ]
    finish(start(tmp_path / 'whole', tiny=tiny))
    kill(tmp_path / 'killed', 19, tiny)
    out = finish(start(tmp_path / 'killed', tiny=tiny))
    assert 'continuing' in out
    assert 'step 21: refreshed' in out
    assert_same_bits(tmp_path / 'whole', tmp_path / 'killed')
    protos = [r['train/proto'] for r in records.read(tmp_path / 'whole') if 'train/proto' in r]
    assert all(x == 0 for x in protos[:11])  # an epoch is 10.1 batches
    assert all(x > 0 for x in protos[11:])


def test_a_run_with_captions_goes_on_with_the_same_bits(tmp_path):
    """Its tokenizer is trained once, and a started run's image encoder is where it begins."""
    tiny = [
        '--config=configs/clip_vit.py',
        *TINY[1:10],
        '--config.text.width=16',
        '--config.text.depth=1',
        '--config.text.heads=2',
        '--config.method.projection=8',
        "--config.evals={'retrieval': {}}",
        '--config.inputs.view_size=12',
    ]
    finish(start(tmp_path / 'whole', tiny=tiny))
    kill(tmp_path / 'killed', 8, tiny)
    before = (tmp_path / 'killed/tokenizer.json').stat().st_mtime_ns
    out = finish(start(tmp_path / 'killed', tiny=tiny))
    assert 'continuing' in out
    assert (tmp_path / 'killed/tokenizer.json').stat().st_mtime_ns == before
    assert_same_bits(tmp_path / 'whole', tmp_path / 'killed')
    found = [r for r in records.read(tmp_path / 'whole') if 'eval/retrieval/text_to_image_r1' in r]
    assert [r['step'] for r in found] == [0, 12]

    lit = [
        f'--config.init_from={tmp_path / "whole"}',
        '--config.method.projection=16',
        '--config.method.locked=True',
    ]
    finish(start(tmp_path / 'frozen', *lit, tiny=tiny))
    theirs, ours = parameters(tmp_path / 'whole'), parameters(tmp_path / 'frozen')
    encoder = [k for k in theirs if k.startswith("['params']['encoder']")]
    assert encoder
    for key in encoder:
        frozen = key.replace("['params']", "['extra']['frozen']")
        assert np.array_equal(theirs[key], ours[frozen]), key


@pytest.mark.slow
def test_killed_at_twenty_random_moments(whole, tmp_path):
    """At any moment, from start-up to the last save."""
    clean = time.monotonic()
    finish(start(tmp_path / 'timing'))
    clean = time.monotonic() - clean
    rng = np.random.default_rng(0)
    for trial in range(20):
        workdir = tmp_path / str(trial)
        process = start(workdir)
        time.sleep(rng.uniform(0.3, 1.0) * clean)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        finish(start(workdir))
        assert_same_bits(whole, workdir)


def test_sigterm_saves_and_exits_cleanly(whole, tmp_path):
    process = start(tmp_path)
    wait_for(tmp_path, 3)
    process.send_signal(signal.SIGTERM)
    out = finish(process)
    assert 'stopped by a signal' in out
    finish(start(tmp_path))
    assert_same_bits(whole, tmp_path)


def test_eight_devices_and_two_processes_have_the_losses_of_one(whole, tmp_path):
    """So has a state split over devices, with gradients cached in micro-batches."""
    finish(start(tmp_path / 'eight', devices=8))
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    two = [
        start(
            tmp_path / 'two',
            f'--coordinator=localhost:{port}',
            '--processes=2',
            f'--process={i}',
            devices=2,
        )
        for i in range(2)
    ]
    for process in two:
        finish(process)
    split = ['--config.fsdp=True', '--config.microbatch=8', '--config.remat=True']
    finish(start(tmp_path / 'split', *split, devices=4))
    for other in ('eight', 'two', 'split'):
        assert np.allclose(losses(whole), losses(tmp_path / other), rtol=1e-5, atol=0), other


def test_records_and_the_newest_checkpoints_are_kept(whole):
    kept = sorted(int(p.name) for p in (whole / 'checkpoints').iterdir() if p.name.isdigit())
    assert kept == [9, 12]
    assert json.loads((whole / 'config.json').read_text())['batch_size'] == 16
    assert 'encoder/' in (whole / 'parameters.txt').read_text()
    recorded = json.loads((whole / 'environment.json').read_text())
    assert recorded['data']['splits'] == {'train': 1297, 'test': 500}
    assert '--config.total_steps=12' in recorded['starts'][0]['command']
    for name in ('inputs.png', 'curves.png'):
        assert (whole / name).read_bytes().startswith(b'\x89PNG')


def test_another_config_is_refused_with_the_differing_keys(whole):
    error = mistake(whole, '--config.seed=1', '--config.method.temperature=0.7')
    assert 'config.seed: there 0, here 1' in error
    assert 'config.method.temperature: there 0.3, here 0.7' in error


def test_eval_only(whole, tmp_path):
    before = parameters(whole)
    out = finish(
        start(whole, '--eval_only', "--config.evals={'knn': {'k': 5}}", '--config.log_every=2')
    )
    assert 'knn, all labels' in out
    # The baselines come last, as this run has none: it was trained without evaluators.
    record, baselines = records.read(whole)[-2:]
    assert (record['step'], baselines['step']) == (12, 0)
    assert 0.1 < record['eval/knn/top1'] <= 1
    assert {'eval/knn/top1', 'eval/knn/baseline_top1'} <= baselines.keys()
    assert parameters(whole).keys() == before.keys()
    out = finish(start(tmp_path / 'nothing', '--eval_only'), code=2)
    assert 'no run in' in out
    assert not (tmp_path / 'nothing').exists()


def test_what_was_trained_can_be_looked_at(whole, tmp_path):
    parts, encoder = inference.open_run(str(whole))
    test = encoder.features('test')
    count = len(parts.splits['test'])
    assert test.x_ND.shape[1] == 16
    assert np.isfinite(np.asarray(test.x_ND)).all()
    labels = [parts.splits['test'][i]['label'] for i in range(count)]
    assert test.label_N[:count].tolist() == labels
    with pytest.raises(UserError, match='no run'):
        inference.open_run(str(tmp_path))


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing_of_it(tmp_path):
    out = finish(
        start(
            tmp_path,
            '--config.optim.learning_rate=1e30',
            '--config.optim.warmup=0.5',
            '--config.checkpoint_every=1',
        ),
        code=2,
    )
    error = out[out.index('error: step') :]
    step = int(error.split('step ')[1].split(':')[0])
    assert 'learning rate' in error
    assert 'digits[' in error
    for key, value in parameters(tmp_path).items():
        assert np.isfinite(np.asarray(value)).all(), key
    kept = [int(p.name) for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit()]
    assert max(kept) < step


def mistake(workdir, *flags):
    """What the command says of a user's mistake, which it must answer quickly and with code 2."""
    out = finish(start(workdir, *flags), code=2)
    assert 'Traceback' not in out, out
    assert 'error: ' in out
    return out


@pytest.mark.parametrize(
    ('flags', 'expected'),
    [
        (['--config=configs/simclr_vit.py:cifra10'], ["'cifra10'", "'cifar10'", "'imagenet'"]),
        (['--config=configs/simclr_vti.py'], ["Did you mean 'simclr_vit.py'"]),
        (['--config.batchsize=3'], ['batchsize', 'batch_size']),
        (['--config.batch_size=many'], ['batch_size', 'many']),
        (['--config.method.name=simclear'], ["'simclear'", "Did you mean 'simclr'"]),
        (['--config.model.name=vitt'], ["'vitt'", "'vit'", "'resnet'"]),
        (['--config.data.source=digit'], ["'digit'", "Did you mean 'digits'", "'folder'"]),
        (['--config.optim.name=adam'], ["'adam'", "'adamw'", "'lars'"]),
        (["--config.evals={'kn': {}}"], ["'kn'", "'knn'"]),
        (["--config.inputs.augment={'jiter': {}}"], ["'jiter'", "'jitter'"]),
        (
            ["--config.inputs.augment={'jitter': {'prob': 1, 'hu': 1}}"],
            ["'hu'", "Did you mean 'hue'"],
        ),
        (['--config.total_steps=0'], ['total_steps', 'total_epochs']),
        (['--config.batch_size=5000'], ['5000', '1297']),
        (['--config.data.source=folder'], ['--config.data.root=DIR']),
        (['stray'], ['stray']),
    ],
)
def test_mistakes_on_the_command_line(flags, expected, tmp_path):
    """Within seconds, in words, without a traceback and without a workdir left behind."""
    out = mistake(tmp_path / 'run', *flags)
    for text in expected:
        assert text in out, out
    assert not (tmp_path / 'run').exists()


def test_a_batch_that_does_not_divide_by_the_devices(tmp_path):
    out = finish(start(tmp_path, '--config.batch_size=12', devices=8), code=2)
    assert 'does not divide by 8 devices' in out
    assert 'Traceback' not in out
