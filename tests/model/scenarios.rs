//! Who does what at the same time, in each model. Small on purpose: each is run under every schedule.

use std::sync::Arc;

use crate::world::World;

type Step = fn(&World);

/// A model: what is done first, and then by each of its threads.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    world: fn() -> World,
    first: &'static [Step],
    threads: &'static [&'static [Step]],
}

use World as W;

pub(crate) const ALL: &[Scenario] = &[
    of("a_save_overlaps_loads", &[], &[&[W::save, W::load], &[W::load, W::load]]),
    of("a_delete_overlaps_loads", &[], &[&[W::delete, W::load], &[W::load, W::load]]),
    of("a_clear_overlaps_loads", &[], &[&[W::clear, W::load], &[W::load, W::load]]),
    of("a_clear_overlaps_a_save", &[], &[&[W::clear, W::load], &[W::save], &[W::load]]),
    of("loads_share_a_flight", &[], &[&[W::load], &[W::load], &[W::load]]),
    of("saves_overlap", &[], &[&[W::save], &[W::save], &[W::load]]),
    of("an_echo_comes", &[W::load], &[&[W::save], &[W::hear, W::load]]),
    of("a_save_overlaps_a_delete", &[], &[&[W::save], &[W::delete], &[W::load]]),
    of(
        "another_instance_saves",
        &[W::load],
        &[&[W::foreign_save, W::hear, W::load], &[W::load], &[W::load]],
    ),
    of(
        "another_instance_deletes",
        &[],
        &[&[W::foreign_delete, W::hear, W::load], &[W::load, W::load]],
    ),
    of(
        "another_instance_saves_beside_ours",
        &[],
        &[&[W::save], &[W::foreign_save, W::hear, W::hear, W::load]],
    ),
    of("a_read_fails", &[], &[&[W::load_in_an_outage], &[W::load], &[W::save]]),
    of("a_read_has_failed", &[], &[&[W::save], &[W::load_in_an_outage, W::load_is_answered]]),
    of(
        "a_slot_outlives_a_read_that_fails",
        &[],
        &[&[W::save], &[W::load_in_an_outage, W::delete, W::load_in_an_outage]],
    ),
    of("a_slot_outlives_a_read", &[], &[&[W::save], &[W::load, W::delete, W::load_in_an_outage]]),
    of("a_read_is_cut_off", &[], &[&[W::load_cut_off], &[W::load], &[W::load]]),
    of("a_save_ends_in_doubt", &[], &[&[W::save_in_doubt], &[W::load, W::load], &[W::hear]]),
    of("reports_are_lost", &[], &[&[W::foreign_save, W::gap, W::load], &[W::save], &[W::load]]),
    of("a_touch_beside_a_save", &[W::load], &[&[W::app_saves, W::load], &[W::app_saves_again]]),
    skipping(
        "a_skipped_save_beside_a_save",
        &[W::load],
        &[&[W::app_saves, W::load], &[W::app_saves_again, W::load]],
    ),
    of(
        "a_touch_beside_a_save_in_doubt",
        &[W::load],
        &[&[W::app_saves_in_doubt], &[W::app_saves_again, W::load]],
    ),
    skipping(
        "a_skipped_save_beside_a_save_in_doubt",
        &[W::load],
        &[&[W::app_saves_in_doubt], &[W::app_saves_again, W::load]],
    ),
    of("a_touch_beside_a_delete", &[W::load], &[&[W::app_deletes, W::load], &[W::app_saves_again]]),
    skipping(
        "a_skipped_save_beside_a_delete",
        &[W::load],
        &[&[W::app_deletes, W::load], &[W::app_saves_again, W::load]],
    ),
    of(
        "a_touch_beside_another_instances_save",
        &[W::load],
        &[&[W::foreign_save, W::hear, W::load], &[W::app_saves_again, W::load]],
    ),
    skipping(
        "a_skipped_save_beside_another_instances_save",
        &[W::load],
        &[&[W::foreign_save, W::hear, W::load], &[W::app_saves_again, W::load]],
    ),
    of(
        "a_touch_beside_a_clear",
        &[W::load],
        &[&[W::clear, W::load], &[W::app_saves_again, W::load]],
    ),
    of("touches_overlap", &[W::load], &[&[W::app_saves_again], &[W::app_saves_again], &[W::load]]),
    of("a_warm_up_overlaps_a_save", &[], &[&[W::warm, W::load], &[W::save, W::load], &[W::load]]),
    of("a_warm_up_overlaps_a_delete", &[], &[&[W::warm, W::load], &[W::delete, W::load]]),
    of("a_warm_up_overlaps_a_clear", &[], &[&[W::warm, W::load], &[W::clear, W::load]]),
    of("a_warm_up_overlaps_a_save_in_doubt", &[], &[&[W::warm], &[W::save_in_doubt, W::load]]),
    of(
        "a_warm_up_overlaps_another_instances_save",
        &[],
        &[&[W::warm, W::load], &[W::foreign_save, W::hear, W::load]],
    ),
    of(
        "a_warm_up_overlaps_a_load",
        &[],
        &[&[W::warm, W::load], &[W::load, W::load], &[W::foreign_save]],
    ),
    of("a_warm_up_overlaps_a_gap", &[], &[&[W::warm], &[W::foreign_delete, W::gap, W::load]]),
    of("a_warm_up_overlaps_a_failed_read", &[], &[&[W::warm], &[W::load_in_an_outage], &[W::save]]),
    of("warm_ups_overlap", &[], &[&[W::warm, W::load], &[W::warm], &[W::save]]),
    timed(
        "a_warm_up_takes_long",
        &[],
        &[&[W::warm, W::load], &[W::foreign_save, W::tick, W::tick, W::load]],
    ),
    timed(
        "the_lease_is_renewed",
        &[W::load],
        &[&[W::foreign_save, W::tick, W::tick], &[W::renew], &[W::load]],
    ),
    timed(
        "the_lease_is_renewed_beside_a_save",
        &[W::load],
        &[&[W::save], &[W::tick, W::tick, W::renew, W::load]],
    ),
    timed(
        "a_flight_grows_old",
        &[],
        &[&[W::foreign_save, W::tick, W::tick, W::load], &[W::load, W::load]],
    ),
    graced(
        "the_grace_is_served",
        &[W::load, W::foreign_delete, W::tick, W::tick],
        &[&[W::load_in_an_outage, W::tick, W::load_in_an_outage], &[W::hear, W::load_in_an_outage]],
    ),
    graced(
        "the_grace_overlaps_a_slow_load",
        &[],
        &[&[W::load], &[W::foreign_save, W::tick, W::tick, W::load, W::load_in_an_outage]],
    ),
];

const fn of(
    name: &'static str,
    first: &'static [Step],
    threads: &'static [&'static [Step]],
) -> Scenario {
    Scenario { name, world: World::new, first, threads }
}

const fn skipping(
    name: &'static str,
    first: &'static [Step],
    threads: &'static [&'static [Step]],
) -> Scenario {
    Scenario { name, world: World::with_skips, first, threads }
}

const fn timed(
    name: &'static str,
    first: &'static [Step],
    threads: &'static [&'static [Step]],
) -> Scenario {
    Scenario { name, world: World::with_time, first, threads }
}

const fn graced(
    name: &'static str,
    first: &'static [Step],
    threads: &'static [&'static [Step]],
) -> Scenario {
    Scenario { name, world: World::with_grace, first, threads }
}

impl Scenario {
    /// Runs the model once, under the schedule that loom has chosen.
    pub(crate) fn run(&'static self) {
        join(spawn("first", || {
            let world = Arc::new((self.world)());
            world.take(self.first);
            let threads: Vec<_> = self
                .threads
                .iter()
                .zip(["a", "b", "c"])
                .map(|(steps, name)| {
                    let world = Arc::clone(&world);
                    spawn(name, move || world.take(steps))
                })
                .collect();
            threads.into_iter().for_each(join);
            world.settle();
        }));
    }
}

impl World {
    fn take(&self, steps: &[Step]) {
        for step in steps {
            step(self);
        }
    }
}

/// In words. The stacks that loom gives its threads of itself, its first one included, are too small
/// for code that is not optimised.
const STACK: usize = 0x8000;

#[allow(clippy::expect_used, reason = "loom always has a thread")]
fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> loom::thread::JoinHandle<()> {
    let thread = loom::thread::Builder::new().name(name.into()).stack_size(STACK);
    thread.spawn(run).expect("a thread")
}

#[allow(clippy::expect_used, reason = "a panic in a thread of loom's ends the model by itself")]
fn join(thread: loom::thread::JoinHandle<()>) {
    thread.join().expect("an end");
}
