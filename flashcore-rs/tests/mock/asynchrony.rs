//! Every access is ordered, whatever safe code does.

use crate::scenarios::CASES;
use crate::support::{assert_sound, mock};
use crate::workload::Workload;

#[test]
fn scenarios_hold_on_the_mock() -> flashcore::Result<()> {
    let work = Workload::new([1, 2, 5, 8], 1)?;
    for (name, case) in CASES {
        let (driver, runtime) = mock();
        case(&runtime, &work).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(driver.violations(), Vec::<String>::new(), "{name}");
        drop(runtime);
        assert_eq!(driver.live(), (0, 0, 0, 0), "{name} leaks");
        assert_sound(&driver);
    }
    Ok(())
}
