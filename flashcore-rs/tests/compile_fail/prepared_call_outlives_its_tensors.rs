use flashcore::{DType, DeviceBuffer, PreparedCall, Result, Runtime, TensorView, TensorViewMut};

fn prepare(runtime: &Runtime, out: &'static mut DeviceBuffer) -> Result<PreparedCall<'static>> {
    let buffer = DeviceBuffer::filled(runtime.stream()?, 64, 0)?;
    let view = TensorView::from_buffer(&buffer, DType::F16, &[1, 1, 4, 8])?;
    runtime.attention(&view, &view, &view).prepare(TensorViewMut::from_buffer(out, DType::F16, &[1, 1, 4, 8])?)
}

fn main() {
    let _ = prepare;
}
