use super::*;

fn at(seconds: u64) -> Moment {
    Moment::from_nanos(seconds * 1_000_000_000)
}

#[test]
fn a_fence_is_passed_by_what_lies_strictly_behind_it() {
    let fences = Fences::default();
    fences.add(at(1), ServerTime(10));
    fences.add(at(2), ServerTime(20));
    assert_eq!(fences.passed(Some(ServerTime(10)), None), None, "more may come of that time");
    assert_eq!(fences.passed(Some(ServerTime(11)), None), Some(at(1)));
    assert_eq!(fences.passed(Some(ServerTime(11)), None), None);
    assert_eq!(fences.passed(None, None), None);
    assert_eq!(fences.passed(Some(ServerTime(21)), None), Some(at(2)));
}

#[test]
fn a_complete_batch_passes_only_fences_that_were_answered_before_it_was_asked_for() {
    let fences = Fences::default();
    let first = fences.asks();
    fences.add(at(1), ServerTime(10));
    assert_eq!(fences.passed(None, Some(first)), None, "under way when the fence was answered");
    let second = fences.asks();
    fences.add(at(2), ServerTime(10));
    assert_eq!(fences.passed(None, Some(second)), Some(at(1)));
    assert_eq!(fences.passed(None, Some(fences.asks())), Some(at(2)));
}

#[test]
fn fences_do_not_pile_up() {
    let fences = Fences::default();
    for _ in 0..2 * MOST_FENCES {
        fences.add(at(1), ServerTime(1));
    }
    assert_eq!(lock(&fences.0).fences.len(), MOST_FENCES);
}

#[test]
fn the_pace_keeps_a_lease_alive_several_times_over() {
    assert_eq!(pace(Duration::from_secs(5)), Duration::from_millis(500));
    assert_eq!(pace(Duration::from_secs(1)), Duration::from_millis(100));
    assert_eq!(pace(Duration::ZERO), Duration::from_millis(10));
    assert_eq!(pace(Duration::MAX), Duration::from_millis(500));
}
