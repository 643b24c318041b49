//! What may cross threads. A type that loses one of these is a breaking change, and perhaps unsound.

use flashcore::{bundle::Bundle, *};

const fn crosses_threads<T: Send + Sync>() {}

const _: () = {
    crosses_threads::<Runtime>();
    crosses_threads::<RuntimeBuilder>();
    crosses_threads::<Stream>();
    crosses_threads::<Event>();
    crosses_threads::<DeviceBuffer>();
    crosses_threads::<Graph>();
    crosses_threads::<TensorView<'_>>();
    crosses_threads::<TensorViewMut<'_>>();
    crosses_threads::<Attention<'_, '_>>();
    crosses_threads::<PreparedCall<'_>>();
    crosses_threads::<Plan>();
    crosses_threads::<Problem>();
    crosses_threads::<Explanation>();
    crosses_threads::<Bundle>();
    crosses_threads::<Error>();
};

#[test]
fn errors_are_errors() {
    const fn is_error<T: std::error::Error + Send + Sync + 'static>() {}
    is_error::<Error>();
    is_error::<BundleError>();
}
