"""Our losses beside lightly's and open_clip's on the same numbers, values and gradients.

They need PyTorch, which nothing else here does, so these tests are skipped where it is missing:

    pip install torch lightly open_clip_torch && python -m pytest tests/test_peers.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from contrastive_jax import losses

torch = pytest.importorskip('torch')
peers = pytest.importorskip('lightly.loss')

B, D, K = 48, 24, 40


def random(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=s).astype(np.float32) for s in shapes]


def unit(x):
    return torch.nn.functional.normalize(x, dim=-1)


def check(ours, theirs, *inputs, rtol=2e-5):
    """Equal values, and equal gradients in every input."""
    value, gradients = jax.jit(jax.value_and_grad(ours, tuple(range(len(inputs)))))(*inputs)
    tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in inputs]
    expected = theirs(*tensors)
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=rtol, abs=1e-6)
    for got, tensor in zip(gradients, tensors, strict=True):
        scale = float(tensor.grad.abs().max())
        assert np.abs(np.asarray(got) - tensor.grad.numpy()).max() <= rtol * scale


@pytest.mark.parametrize('seed', range(5))
class TestLightly:
    def test_nt_xent(self, seed):
        theirs = peers.NTXentLoss(temperature=0.2)
        check(
            lambda a, b: losses.nt_xent(a, b, temperature=0.2),
            theirs,
            *random(seed, (B, D), (B, D)),
        )

    def test_info_nce_with_a_queue(self, seed):
        a, b, queue = random(seed, (B, D), (B, D), (K, D))
        theirs = peers.NTXentLoss(temperature=0.2, memory_bank_size=(K, D))
        # The bank is a buffer of unit vectors [K, D].
        theirs.memory_bank.bank = unit(torch.tensor(queue, dtype=torch.float64))
        check(
            lambda a: losses.info_nce(a, jnp.asarray(b), jnp.asarray(queue), temperature=0.2),
            lambda a: theirs(a, torch.tensor(b, dtype=torch.float64)),
            a,
        )

    def test_barlow_twins(self, seed):
        theirs = peers.BarlowTwinsLoss(lambda_param=0.01)
        ours = lambda a, b: losses.barlow_twins(a, b, off_diagonal=0.01)  # noqa: E731
        check(ours, theirs, *random(seed, (B, D), (B, D)))

    def test_vicreg(self, seed):
        theirs = peers.VICRegLoss()
        check(lambda a, b: losses.vicreg(a, b)[0], theirs, *random(seed, (B, D), (B, D)))

    def test_negative_cosine(self, seed):
        check(
            lambda p, z: losses.cosine_distance(p, z) / 2 - 1,
            peers.NegativeCosineSimilarity(),
            *random(seed, (B, D), (B, D)),
        )

    def test_koleo(self, seed):
        check(losses.koleo, peers.KoLeoLoss(), *random(seed, (B, D)))

    def test_swav_with_local_views(self, seed):
        scores = np.tanh(np.stack(random(seed, *[(B, K)] * 4), axis=1) / 3)

        def ours(scores_BVK):
            targets = [losses.sinkhorn(scores_BVK[:, g], temperature=0.05) for g in (0, 1)]
            return losses.swapped(jnp.stack(targets, 1), scores_BVK, temperature=0.1)

        def theirs(scores):
            views = list(scores.unbind(1))
            return peers.SwaVLoss()(views[:2], views[2:]).sum()

        check(ours, theirs, scores)

    def test_dino_and_its_centre(self, seed):
        student, teacher, centre = random(seed, (B, 5, K), (B, 2, K), (K,))
        theirs = peers.DINOLoss(output_dim=K, student_temp=0.1, center_momentum=0.9)
        theirs.center = torch.tensor(centre, dtype=torch.float64)[None, None]

        def ours(student):
            targets = losses.teacher(jnp.asarray(teacher), jnp.asarray(centre), 0.05)
            return losses.swapped(targets, student, temperature=0.1)

        check(
            ours,
            lambda x: theirs(
                list(torch.tensor(teacher, dtype=torch.float64).unbind(1)),
                list(x.unbind(1)),
                teacher_temp=0.05,
            ),
            student,
        )
        moved = losses.centre(jnp.asarray(teacher), jnp.asarray(centre), 0.9)
        assert np.allclose(theirs.center.numpy().reshape(-1), moved, atol=1e-6)


@pytest.mark.parametrize('seed', range(5))
class TestOpenClip:
    def test_clip(self, seed):
        clip = pytest.importorskip('open_clip.loss')
        check(
            lambda a, b, scale: losses.clip(a, b, scale),
            lambda a, b, scale: clip.ClipLoss()(unit(a), unit(b), scale),
            *random(seed, (B, D), (B, D)),
            np.float32(12),
        )

    def test_siglip(self, seed):
        clip = pytest.importorskip('open_clip.loss')
        check(
            losses.siglip,
            lambda a, b, scale, bias: clip.SigLipLoss()(unit(a), unit(b), scale, bias),
            *random(seed, (B, D), (B, D)),
            np.float32(8),
            np.float32(-3),
        )
