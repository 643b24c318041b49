//! Runtimes on the mock.

use std::sync::Arc;

use flashcore::bundle::Bundle;
use flashcore::testing::{self, MockConfig, MockDriver};
use flashcore::{Result, Runtime};

/// A mock with one device, and a runtime on it with the sample bundle.
pub fn mock() -> (Arc<MockDriver>, Runtime) {
    let driver = Arc::new(MockDriver::default());
    let runtime = runtime(&driver, 0).expect("a runtime on the mock");
    (driver, runtime)
}

/// A runtime on a device of the mock.
pub fn runtime(driver: &Arc<MockDriver>, ordinal: u32) -> Result<Runtime> {
    let bundle = testing::sample_bundle();
    driver.learn(Bundle::parse(&bundle)?.manifest());
    testing::with_driver(Runtime::builder().ordinal(ordinal).bundle(bundle), driver).build()
}

/// A mock with devices of these compute capabilities.
pub fn devices(capabilities: &[(u32, u32)]) -> Arc<MockDriver> {
    let devices = (0..).zip(capabilities).map(|(ordinal, &capability)| MockConfig::device(ordinal, capability));
    Arc::new(MockDriver::new(MockConfig { devices: devices.collect(), ..MockConfig::default() }))
}

/// Asserts that no rule was broken.
#[track_caller]
pub fn assert_sound(driver: &MockDriver) {
    assert_eq!(driver.violations(), Vec::<String>::new());
}

