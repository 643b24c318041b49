//! The plan: which kernel, and every parameter it gets.

use flashcore::{DType, DeviceBuffer, TensorView, TensorViewMut};

use crate::support::{assert_sound, mock};
use crate::workload::noise;

#[test]
fn an_attention_runs_from_views_to_output() -> flashcore::Result<()> {
    let (driver, runtime) = mock();
    let shape = [2, 3, 5, 8];
    let stream = runtime.stream()?;
    let [q, k, v] = [1, 2, 3].map(|seed| noise(240, seed));
    let [dq, dk, dv] = [&q, &k, &v].map(|data| DeviceBuffer::from_slice(stream, data));
    let (dq, dk, dv) = (dq?, dk?, dv?);
    let mut out = DeviceBuffer::filled(stream, 480, 0xff)?;
    runtime
        .attention(
            &TensorView::from_buffer(&dq, DType::F16, &shape)?,
            &TensorView::from_buffer(&dk, DType::F16, &shape)?,
            &TensorView::from_buffer(&dv, DType::F16, &shape)?,
        )
        .run(&mut TensorViewMut::from_buffer(&mut out, DType::F16, &shape)?)?;
    let got = out.to_vec::<half::f16>()?;
    let mut expected = vec![half::f16::ZERO; 240];
    flashcore::Runtime::cpu()
        .attention(
            &TensorView::from_slice(&q, &shape)?,
            &TensorView::from_slice(&k, &shape)?,
            &TensorView::from_slice(&v, &shape)?,
        )
        .run(&mut TensorViewMut::from_slice(&mut expected, &shape)?)?;
    assert_sound(&driver);
    for (got, expected) in got.iter().zip(&expected) {
        assert!((got.to_f32() - expected.to_f32()).abs() < 1e-3, "{got} {expected}");
    }
    Ok(())
}
