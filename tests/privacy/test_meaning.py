# SPDX-License-Identifier: Apache-2.0
"""What an epsilon means agrees with closed forms and with riskcal, and errs on the pessimistic side."""

import functools
import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from riskcal.analysis import get_advantage_from_pld, get_beta_from_pld
from scipy import stats

from dpquant.privacy import accounting
from dpquant.privacy.events import Event
from dpquant.privacy.meaning import FALSE_POSITIVES, details_of, epsilon_of_person, meaning_of, percent_up, too_large

DELTA = 1e-5
RELEASES = [(0.1, 2.0, 60), (0.01, 1.0, 10)]
RUN = [Event(kind="train", sample_rate=q, noise_multiplier=sigma, count=count) for q, sigma, count in RELEASES]


def gaussian(mu):
    """One release without subsampling: its trade-off curve is that of two normal distributions at distance mu."""
    return [Event(kind="train", sample_rate=1.0, noise_multiplier=1 / mu)]


def assert_is_the_gaussian_curve(found, mu):
    for attack in found.attacks:
        exact = stats.norm.cdf(stats.norm.ppf(attack.false_positive_rate) + mu)
        assert exact - 1e-9 <= attack.true_positive_rate <= 1.01 * exact + 0.005
    assert -1e-9 <= found.even_odds - stats.norm.cdf(mu / 2) < 0.005 and -1e-9 <= found.mu - mu < 0.02


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.0])
def test_one_gaussian_release_means_what_its_closed_form_says(mu):
    assert_is_the_gaussian_curve(meaning_of(gaussian(mu), DELTA), mu)


@pytest.mark.parametrize("factor", [0.97, 1.05])
def test_the_meaning_of_other_noise_would_be_seen(factor):
    with pytest.raises(AssertionError):
        assert_is_the_gaussian_curve(meaning_of(gaussian(factor * 1.0), DELTA), 1.0)


@functools.cache
def pld_of_the_run():
    parts = [
        privacy_loss_distribution.from_gaussian_mechanism(
            sigma, sampling_prob=q, value_discretization_interval=1e-3
        ).self_compose(count)
        for q, sigma, count in RELEASES
    ]
    return parts[0].compose(parts[1])


def assert_agrees_with_riskcal(found):
    betas = get_beta_from_pld(pld_of_the_run(), alpha=np.array(FALSE_POSITIVES))
    for attack, beta in zip(found.attacks, betas, strict=True):
        assert -1e-3 <= attack.true_positive_rate - (1 - beta) < 0.01
    advantage = get_advantage_from_pld(pld_of_the_run())
    assert -1e-4 <= found.even_odds - (1 + advantage) / 2 < 0.005


def test_the_meaning_of_a_run_agrees_with_riskcal():
    found = meaning_of(RUN, DELTA)
    assert_agrees_with_riskcal(found)
    assert all(one.true_positive_rate <= one.from_epsilon_alone for one in found.attacks)


def test_a_meaning_without_the_analyses_or_with_half_the_steps_would_be_seen():
    with pytest.raises(AssertionError):
        assert_agrees_with_riskcal(meaning_of([Event(**{**vars(RUN[0]), "count": 30}), RUN[1]], DELTA))


def test_mu_dominates_where_it_is_said_to():
    found, epsilons = meaning_of(RUN, DELTA), np.linspace(0, accounting.epsilon(RUN, DELTA), 20)
    for epsilon, delta in zip(epsilons, accounting.deltas(RUN, epsilons), strict=True):
        tails = stats.norm.cdf(-epsilon / found.mu + np.array([0.5, -0.5]) * found.mu)
        assert delta <= tails[0] - math.exp(epsilon) * tails[1] + 1e-6


def test_a_person_with_k_records_and_no_subsampling_has_k_times_the_sensitivity():
    for records in (2, 5):
        exact = accounting.epsilon(gaussian(0.5 * records), DELTA)
        assert exact - 1e-3 <= epsilon_of_person(gaussian(0.5), DELTA, records) <= exact + 0.1 * records
    assert epsilon_of_person(RUN, DELTA, 1) == accounting.epsilon(RUN, DELTA)


def loss_of_a_mixture(records, q, sigma, epsilon):
    """delta(epsilon) of one release of a binomial number of records, by integrating densities; the worse direction."""
    x = np.linspace(-12 * sigma, records + 12 * sigma, 200_001)
    weights = stats.binom.pmf(np.arange(records + 1), records, q)
    there = sum(w * stats.norm.pdf(x, k, sigma) for k, w in enumerate(weights))
    without = stats.norm.pdf(x, 0, sigma)
    both = [np.trapezoid(np.maximum(p - math.exp(epsilon) * r, 0), x) for p, r in ((there, without), (without, there))]
    return max(both)


def assert_is_the_mixtures_epsilon(epsilon, records):
    assert loss_of_a_mixture(records, 0.2, 1.0, epsilon) <= DELTA * 1.001
    assert loss_of_a_mixture(records, 0.2, 1.0, epsilon - 0.15) > DELTA


@pytest.mark.parametrize("records", [2, 4])
def test_several_records_agree_with_integrated_densities(records):
    one = [Event(kind="train", sample_rate=0.2, noise_multiplier=1.0)]
    assert_is_the_mixtures_epsilon(epsilon_of_person(one, DELTA, records), records)


def test_records_that_are_drawn_together_or_one_record_fewer_would_be_seen():
    one = [Event(kind="train", sample_rate=0.2, noise_multiplier=1.0)]
    with pytest.raises(AssertionError):
        assert_is_the_mixtures_epsilon(epsilon_of_person(one, DELTA, 3), 4)


def test_details_state_persons_and_other_deltas():
    found = details_of(RUN, DELTA, records_per_person=3)
    assert [one.records for one in found.persons] == [1, 2, 3, 5, 10]
    assert found.persons[0].epsilon == found.epsilons[DELTA] == accounting.epsilon(RUN, DELTA)
    growing = [one.epsilon for one in found.persons]
    assert growing == sorted(growing)
    assert list(found.epsilons) == [1e-4, 1e-5, 1e-6, 1e-7, 1e-8]
    for delta, epsilon in found.epsilons.items():
        assert epsilon == pytest.approx(accounting.epsilon(RUN, delta), rel=1e-9)


def test_what_has_no_noise_or_no_release_has_no_meaning():
    silent = [Event(kind="train", sample_rate=0.1, noise_multiplier=0.0)]
    for events in ([], silent, [Event(kind="train", sample_rate=0.1, noise_multiplier=1.0, count=0)]):
        assert meaning_of(events, DELTA) is None and details_of(events, DELTA) is None
    assert epsilon_of_person(silent, DELTA, 2) == math.inf and epsilon_of_person([], DELTA, 2) == 0


def test_a_delta_above_one_in_the_records_is_warned_of():
    assert "larger than 1 / records" in too_large(1e-5, 1_000_000)
    assert too_large(1e-5, 100_000) == too_large(1e-4, 1_442) == too_large(0.1, None) == ""


@pytest.mark.parametrize(
    ("share", "text"), [(0.2841, "28.5 %"), (0.284, "28.4 %"), (0.9999, "100.0 %"), (2.0, "100.0 %")]
)
def test_a_share_is_rounded_up(share, text):
    assert percent_up(share) == text


def test_the_sentence_quotes_the_numbers():
    found = meaning_of(RUN, DELTA)
    assert percent_up(found.at(0.01).true_positive_rate) in found.told and "1 %" in found.told
    assert dict(found.rows())["best guess at even odds"] == percent_up(found.even_odds)
