//! The models: each names the steps that its threads take at the same time.
//!
//! They are small on purpose, because each runs under every schedule.

use crate::model_check::check;
use crate::model_check::world::World;

use World as W;

#[test]
fn a_save_overlaps_loads() {
    check(World::new, &[], &[&[W::save, W::load], &[W::load, W::load]]);
}

#[test]
fn a_delete_overlaps_loads() {
    check(World::new, &[], &[&[W::delete, W::load], &[W::load, W::load]]);
}

#[test]
fn a_clear_overlaps_loads() {
    check(World::new, &[], &[&[W::clear, W::load], &[W::load, W::load]]);
}

#[test]
fn a_clear_overlaps_a_save() {
    check(World::new, &[], &[&[W::clear, W::load], &[W::save], &[W::load]]);
}

#[test]
fn loads_share_a_read() {
    check(World::new, &[], &[&[W::load], &[W::load], &[W::load]]);
}

#[test]
fn saves_overlap() {
    check(World::new, &[], &[&[W::save], &[W::save], &[W::load]]);
}

#[test]
fn the_stream_reports_our_save() {
    check(World::new, &[W::load], &[&[W::save], &[W::receive_change, W::load]]);
}

#[test]
fn a_save_overlaps_a_delete() {
    check(World::new, &[], &[&[W::save], &[W::delete], &[W::load]]);
}

#[test]
fn another_instance_saves() {
    check(
        World::new,
        &[W::load],
        &[&[W::foreign_save, W::receive_change, W::load], &[W::load], &[W::load]],
    );
}

#[test]
fn another_instance_deletes() {
    check(
        World::new,
        &[],
        &[&[W::foreign_delete, W::receive_change, W::load], &[W::load, W::load]],
    );
}

#[test]
fn another_instance_saves_beside_ours() {
    check(
        World::new,
        &[],
        &[&[W::save], &[W::foreign_save, W::receive_change, W::receive_change, W::load]],
    );
}

#[test]
fn a_read_fails() {
    check(World::new, &[], &[&[W::load_in_an_outage], &[W::load], &[W::save]]);
}

#[test]
fn a_read_has_failed() {
    check(World::new, &[], &[&[W::save], &[W::load_in_an_outage, W::load_without_failure]]);
}

#[test]
fn a_key_stays_tracked_after_a_failed_read() {
    check(World::new, &[], &[&[W::save], &[W::load_in_an_outage, W::delete, W::load_in_an_outage]]);
}

#[test]
fn a_key_stays_tracked_after_a_read() {
    check(World::new, &[], &[&[W::save], &[W::load, W::delete, W::load_in_an_outage]]);
}

#[test]
fn a_read_is_cut_off() {
    check(World::new, &[], &[&[W::load_cut_off], &[W::load], &[W::load]]);
}

#[test]
fn a_save_with_unknown_outcome_overlaps_loads() {
    check(
        World::new,
        &[],
        &[&[W::save_with_unknown_outcome], &[W::load, W::load], &[W::receive_change]],
    );
}

#[test]
fn the_stream_has_a_gap() {
    check(World::new, &[], &[&[W::foreign_save, W::gap, W::load], &[W::save], &[W::load]]);
}

#[test]
fn a_touch_beside_a_save() {
    check(World::new, &[W::load], &[&[W::app_save_new, W::load], &[W::app_save_unchanged]]);
}

#[test]
fn a_skipped_save_beside_a_save() {
    check(
        World::with_skips,
        &[W::load],
        &[&[W::app_save_new, W::load], &[W::app_save_unchanged, W::load]],
    );
}

#[test]
fn a_touch_beside_a_save_with_unknown_outcome() {
    check(
        World::new,
        &[W::load],
        &[&[W::app_save_with_unknown_outcome], &[W::app_save_unchanged, W::load]],
    );
}

#[test]
fn a_skipped_save_beside_a_save_with_unknown_outcome() {
    check(
        World::with_skips,
        &[W::load],
        &[&[W::app_save_with_unknown_outcome], &[W::app_save_unchanged, W::load]],
    );
}

#[test]
fn a_touch_beside_a_delete() {
    check(World::new, &[W::load], &[&[W::app_delete, W::load], &[W::app_save_unchanged]]);
}

#[test]
fn a_skipped_save_beside_a_delete() {
    check(
        World::with_skips,
        &[W::load],
        &[&[W::app_delete, W::load], &[W::app_save_unchanged, W::load]],
    );
}

#[test]
fn a_touch_beside_another_instances_save() {
    check(
        World::new,
        &[W::load],
        &[&[W::foreign_save, W::receive_change, W::load], &[W::app_save_unchanged, W::load]],
    );
}

#[test]
fn a_skipped_save_beside_another_instances_save() {
    check(
        World::with_skips,
        &[W::load],
        &[&[W::foreign_save, W::receive_change, W::load], &[W::app_save_unchanged, W::load]],
    );
}

#[test]
fn a_touch_beside_a_clear() {
    check(World::new, &[W::load], &[&[W::clear, W::load], &[W::app_save_unchanged, W::load]]);
}

#[test]
fn touches_overlap() {
    check(
        World::new,
        &[W::load],
        &[&[W::app_save_unchanged], &[W::app_save_unchanged], &[W::load]],
    );
}

#[test]
fn a_warm_up_overlaps_a_save() {
    check(World::new, &[], &[&[W::warm, W::load], &[W::save, W::load], &[W::load]]);
}

#[test]
fn a_warm_up_overlaps_a_delete() {
    check(World::new, &[], &[&[W::warm, W::load], &[W::delete, W::load]]);
}

#[test]
fn a_warm_up_overlaps_a_clear() {
    check(World::new, &[], &[&[W::warm, W::load], &[W::clear, W::load]]);
}

#[test]
fn a_warm_up_overlaps_a_save_with_unknown_outcome() {
    check(World::new, &[], &[&[W::warm], &[W::save_with_unknown_outcome, W::load]]);
}

#[test]
fn a_warm_up_overlaps_another_instances_save() {
    check(World::new, &[], &[&[W::warm, W::load], &[W::foreign_save, W::receive_change, W::load]]);
}

#[test]
fn a_warm_up_overlaps_a_load() {
    check(World::new, &[], &[&[W::warm, W::load], &[W::load, W::load], &[W::foreign_save]]);
}

#[test]
fn a_warm_up_overlaps_a_gap() {
    check(World::new, &[], &[&[W::warm], &[W::foreign_delete, W::gap, W::load]]);
}

#[test]
fn a_warm_up_overlaps_a_failed_read() {
    check(World::new, &[], &[&[W::warm], &[W::load_in_an_outage], &[W::save]]);
}

#[test]
fn warm_ups_overlap() {
    check(World::new, &[], &[&[W::warm, W::load], &[W::warm], &[W::save]]);
}

#[test]
fn a_warm_up_takes_long() {
    check(
        World::with_time,
        &[],
        &[&[W::warm, W::load], &[W::foreign_save, W::tick, W::tick, W::load]],
    );
}

#[test]
fn the_lease_is_renewed() {
    check(
        World::with_time,
        &[W::load],
        &[&[W::foreign_save, W::tick, W::tick], &[W::renew], &[W::load]],
    );
}

#[test]
fn the_lease_is_renewed_beside_a_save() {
    check(World::with_time, &[W::load], &[&[W::save], &[W::tick, W::tick, W::renew, W::load]]);
}

#[test]
fn a_flight_grows_old() {
    check(
        World::with_time,
        &[],
        &[&[W::foreign_save, W::tick, W::tick, W::load], &[W::load, W::load]],
    );
}

#[test]
fn the_grace_is_served() {
    check(
        World::with_grace,
        &[W::load, W::foreign_delete, W::tick, W::tick],
        &[
            &[W::load_in_an_outage, W::tick, W::load_in_an_outage],
            &[W::receive_change, W::load_in_an_outage],
        ],
    );
}

#[test]
fn the_grace_overlaps_a_slow_load() {
    check(
        World::with_grace,
        &[],
        &[&[W::load], &[W::foreign_save, W::tick, W::tick, W::load, W::load_in_an_outage]],
    );
}

#[test]
fn two_requests_overlap() {
    check(World::new, &[W::load], &[&[W::request_adds_a, W::load], &[W::request_adds_b, W::load]]);
}

#[test]
fn two_requests_overlap_a_load() {
    check(World::new, &[], &[&[W::request_adds_a], &[W::request_adds_b], &[W::load]]);
}

#[test]
fn two_requests_overlap_a_delete() {
    check(
        World::new,
        &[W::load],
        &[&[W::request_adds_a], &[W::request_adds_b], &[W::app_delete, W::load]],
    );
}

#[test]
fn a_request_overlaps_another_instances_request() {
    check(
        World::new,
        &[W::load],
        &[&[W::request_adds_a, W::load], &[W::foreign_add, W::receive_change, W::load]],
    );
}

#[test]
fn requests_overlap_another_instances_request() {
    check(
        World::new,
        &[W::load],
        &[&[W::request_adds_a], &[W::request_adds_b, W::load], &[W::foreign_add]],
    );
}
