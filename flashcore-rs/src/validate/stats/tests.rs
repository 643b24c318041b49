use super::*;

/// What two more orders of magnitude of suites give is 5.4 % at the margin, for nine independent cases.
#[test]
fn the_rules_keep_what_they_promise() {
    for row in calibrate(&Plan::quick(), &mut || ()) {
        assert!(row.met, "{row:?}");
    }
}
