use flashcore::{Attention, DType, DeviceBuffer, Result, Runtime, TensorView};

fn prepare(runtime: &Runtime) -> Result<Attention<'_, '_>> {
    let buffer = DeviceBuffer::filled(runtime.stream()?, 64, 0)?;
    let view = TensorView::from_buffer(&buffer, DType::F16, &[1, 1, 4, 8])?;
    Ok(runtime.attention(&view, &view, &view))
}

fn main() {
    let _ = prepare(&Runtime::cpu());
}
