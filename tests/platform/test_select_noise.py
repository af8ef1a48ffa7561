"""The noise of losses and the tests against it: closed forms, simulated worlds whose truth is known, and scipy."""

import math

import numpy as np
import pytest
from scipy import integrate, special, stats

from wattier.records import EpochRecord
from wattier.select_clear import Ordered, chances, clear_group, not_worse, of_many
from wattier.select_noise import estimate_noise, late_scatter, moderate, repeated_variance

LEVEL = 0.05


def curve(losses, first=1):
    return [EpochRecord(e, None, loss, {}, 10 * e, 1.0, None) for e, loss in enumerate(losses, start=first)]


def table(losses, variances, freedom=math.inf, total=1e9):
    n = len(losses)
    order = np.argsort(losses)
    return Ordered(np.array(losses)[order], np.array(variances)[order], np.full(n, min(freedom, 1e9)), total)


class TestLateEpochs:
    def test_a_parabola_has_no_noise_and_one_kink_has_this_much(self):
        parabola = [(8.0 - e) ** 2 / 10 + 1 for e in range(8)]
        assert late_scatter(curve(parabola))[0] == pytest.approx(0, abs=1e-20)
        # Of four losses a parabola leaves their part along (1, -3, 3, -1) / sqrt(20).
        assert late_scatter(curve([9.0, 7.0, 5.0, 3.0, 1.0, 1.0, 1.0, 2.0])) == (pytest.approx(1 / 20), 1)

    def test_only_the_second_half_counts_and_never_fewer_than_four_epochs(self):
        calm, wild = [1.0] * 10, [1.0, 5.0] * 5
        assert late_scatter(curve(wild + calm))[0] == pytest.approx(0, abs=1e-20)
        assert late_scatter(curve(calm + wild))[0] > 1
        assert late_scatter(curve([9.0, 1.0, 5.0, 1.0, 5.0])) == late_scatter(curve([1.0, 5.0, 1.0, 5.0]))

    @pytest.mark.parametrize(
        "losses",
        [[], [1.0], [1.0, 2.0, 3.0], [1.0, None, 2.0, 3.0], [1.0, 2.0, math.nan, math.inf, 3.0], [None] * 6],
    )
    def test_without_four_losses_nothing_is_said(self, losses):
        assert late_scatter(curve(losses)) is None

    @pytest.mark.parametrize("losses", [[1.0, 1.2, 0.9, 1.1], [3.0, 1.0, None, 1.2, 0.9, 1.0, 1.4, 0.8, 1.3]])
    def test_it_is_the_variance_that_numpys_least_squares_leave(self, losses):
        epochs = [e for e, loss in enumerate(losses, start=1) if e > len(losses) - max(4, len(losses) // 2) and loss]
        _, residuals, *_ = np.polyfit(epochs, [losses[e - 1] for e in epochs], 2, full=True)
        assert late_scatter(curve(losses)) == (pytest.approx(residuals[0] / (len(epochs) - 3)), len(epochs) - 3)

    @pytest.mark.parametrize("epochs", [4, 10, 24])
    def test_it_is_unbiased_and_has_the_freedom_it_claims(self, epochs):
        rng = np.random.default_rng(epochs)
        trend = np.linspace(3, 2, epochs) ** 2
        found = np.array([late_scatter(curve(trend + 0.3 * rng.standard_normal(epochs))) for _ in range(3000)])
        assert found[:, 0].mean() == pytest.approx(0.09, rel=0.08)
        # A variance with f degrees of freedom has itself the variance 2 sigma^4 / f.
        assert 2 * 0.09**2 / found[:, 0].var() == pytest.approx(found[0, 1], rel=0.15)


class TestModeration:
    def test_variances_that_are_all_alike_become_one(self):
        rng = np.random.default_rng(1)
        variances = 0.04 * rng.chisquare(3, 300) / 3
        common, prior, moderated = moderate(variances, np.full(300, 3.0))
        assert prior > 10
        assert common == pytest.approx(0.04, rel=0.1)
        assert moderated.std() < 0.3 * variances.std()

    def test_the_parameters_of_a_simulated_world_come_back(self):
        rng = np.random.default_rng(2)
        truth = 0.04 * 6 / rng.chisquare(6, 6000)  # scaled inverse chi-square, 6 degrees of freedom
        variances = truth * rng.chisquare(5, 6000) / 5
        common, prior, moderated = moderate(variances, np.full(6000, 5.0))
        assert 4 < prior < 6.3  # of what is uncertain about it, the cautious end
        assert common == pytest.approx(0.04, rel=0.1)
        assert moderated == pytest.approx((prior * common + 5 * variances) / (prior + 5))
        errors = [np.mean((np.log(v) - np.log(truth)) ** 2) for v in (variances, moderated)]
        assert errors[1] < 0.6 * errors[0]

    @pytest.mark.parametrize("variances", [[0.0, 0.0, 0.0, 1.0], [2.0, 4.0]])
    def test_few_or_noiseless_ones_are_pooled(self, variances):
        common, prior, moderated = moderate(np.array(variances), np.ones(len(variances)))
        assert (common, prior) == (np.mean(variances), math.inf)
        assert (moderated == common).all()


class TestNoise:
    def test_trials_without_a_curve_have_that_of_the_others(self, trial):
        rng = np.random.default_rng(3)
        trials = [trial(f"t{i}", params={"x": i}) for i in range(30)]
        curves = {t.trial_id: curve(1 + 0.1 * rng.standard_normal(12)) for t in trials[:29]}
        noise = estimate_noise(trials, curves)
        assert noise.record.std == pytest.approx(0.1, rel=0.15)
        assert (noise.record.trials, noise.record.source) == (29, "late epochs")
        assert noise.std("t29") == pytest.approx(noise.record.std, rel=0.1)

    def test_too_few_epochs_say_nothing(self, trial):
        assert estimate_noise([trial("a"), trial("b")], {}) is None
        assert estimate_noise([trial("a", params={"x": 1})], {"a": curve([1.0, 2.0, 1.0, 2.0])}) is None

    def test_repetitions_alone_do(self, trial):
        losses = [1.0, 1.2, 1.1, 1.3]
        noise = estimate_noise([trial(f"t{i}", val_loss=loss) for i, loss in enumerate(losses)], {})
        assert noise.record.std == pytest.approx(np.std(losses, ddof=1))
        assert (noise.record.degrees_of_freedom, noise.record.source) == (3, "repeated configurations")

    def test_repetitions_add_what_epochs_do_not_show(self, trial):
        """Ten configurations three times each: 0.2 from training to training, 0.1 from epoch to epoch."""
        rng = np.random.default_rng(4)
        trials, curves = [], {}
        for i in range(300):
            level = 1 + 0.2 * rng.standard_normal()
            losses = level + 0.1 * rng.standard_normal(12)
            trials.append(trial(f"t{i:03d}", params={"x": i % 100}, val_loss=float(losses[-1])))
            curves[f"t{i:03d}"] = curve(losses)
        noise = estimate_noise(trials, curves)
        assert repeated_variance(trials) == (pytest.approx(0.05, rel=0.2), 200)
        assert noise.std("t000") == pytest.approx(math.hypot(0.1, 0.2), rel=0.1)
        assert noise.total == 200

    def test_losses_without_noise_have_only_the_rounding_of_their_arithmetic(self, trial):
        trials = [trial(f"t{i}", val_loss=1.0 + i, params={"x": i}) for i in range(5)]
        noise = estimate_noise(trials, {t.trial_id: curve([1.0] * 8) for t in trials})
        assert 0 < noise.std("t0") < 1e-8


class TestTests:
    @pytest.mark.parametrize(("stds", "counts"), [((0.1, 0.3), (4, 9)), ((0.2, 0.2), (3, 3))])
    def test_two_losses_as_scipy_compares_them(self, stds, counts):
        two = Ordered(np.array([1.0, 1.4]), np.square(stds) / counts, np.array(counts) - 1.0, 1e9)
        t, p = chances(two, np.array([0]), np.array([1]))
        theirs = stats.ttest_ind_from_stats(1.4, stds[1], counts[1], 1.0, stds[0], counts[0], equal_var=False)
        assert t[0, 0] == pytest.approx(theirs.statistic)
        assert p[0, 0] == pytest.approx(theirs.pvalue / 2)

    def test_no_comparison_has_more_freedom_than_all_trials_together(self):
        two = Ordered(np.array([1.0, 1.4]), np.full(2, 0.01), np.full(2, 50.0), 10.0)
        t, p = chances(two, np.array([0]), np.array([1]))
        assert p[0, 0] == pytest.approx(stats.t.sf(t[0, 0], 10))

    @pytest.mark.parametrize("n", [2, 5, 400])
    def test_many_comparisons_are_never_more_sure_than_dunnetts(self, n):
        """Dunnett's chance for equal variances is one integral; where Sidak's bound is 5 %, it is 5 % to 2 %."""
        t = float(stats.norm.isf(1 - 0.95 ** (1 / (n - 1))))
        assert of_many(np.array(stats.norm.sf(t)), n - 1) == pytest.approx(0.05)
        within = integrate.quad(lambda z: special.ndtr(t * math.sqrt(2) + z) ** (n - 1) * stats.norm.pdf(z), -9, 9)[0]
        assert 0.02 < 1 - within <= 0.05 + 1e-9

    def test_the_truly_best_is_kept_as_often_as_promised(self):
        rng = np.random.default_rng(5)
        kept = 0
        for _ in range(400):
            stds = rng.uniform(0.5, 2, 12)
            losses = np.concatenate(([0.0], rng.uniform(0, 1, 11))) + stds * rng.standard_normal(12)
            p = not_worse(table(losses, stds**2))
            kept += p[np.argsort(losses).tolist().index(0)] >= LEVEL
        assert kept / 400 >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 400)

    def test_who_is_far_behind_is_clearly_worse_and_equal_ones_are_not(self):
        p = not_worse(table([1.0, 1.0, 1.05, 9.0], [0.01] * 4))
        assert (p[:3] > 0.5).all()
        assert p[3] < 1e-9

    def test_a_lucky_noisy_lowest_does_not_shield_those_who_are_clearly_worse_than_a_quiet_one(self):
        p = not_worse(table([1.0, 1.1, 2.0], [4.0, 0.001, 0.001]))
        assert p[1] > 0.5
        assert p[2] < 1e-6

    def test_where_all_are_equal_a_group_is_clear_as_rarely_as_promised(self):
        rng = np.random.default_rng(6)
        found = sum(clear_group(table(rng.standard_normal(20), np.ones(20)), 10, LEVEL) is not None for _ in range(500))
        assert found / 500 <= LEVEL

    @pytest.mark.parametrize(("at_most", "size"), [(1, None), (2, None), (3, 3), (10, 3)])
    def test_the_group_with_the_widest_margin_is_the_clear_one(self, at_most, size):
        found = clear_group(table([1.0, 1.01, 1.02, 2.0, 2.01, 2.8, 2.81], [0.01] * 7), at_most, LEVEL)
        assert (found and found[0]) == size

    def test_a_margin_is_counted_in_the_noise_of_the_two_and_not_in_loss(self):
        losses, quiet, loud = [1.0, 1.2, 9.0], 1e-6, 9.0
        assert clear_group(table(losses, [quiet, quiet, loud]), 2, LEVEL)[0] == 1
        assert clear_group(table(losses, [quiet, quiet, quiet]), 2, LEVEL)[0] == 2

    def test_one_noisy_outsider_may_not_be_overlooked_behind_a_quiet_one(self):
        """The third is far above, but so noisy that nobody is clearly below it."""
        assert clear_group(table([1.0, 2.0, 2.5], [1e-4, 1e-4, 25.0]), 1, LEVEL) is None
