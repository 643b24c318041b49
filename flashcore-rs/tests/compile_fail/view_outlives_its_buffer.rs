use flashcore::{DType, DeviceBuffer, Runtime, TensorView};

fn main() -> flashcore::Result<()> {
    let runtime = Runtime::cuda(0)?;
    let buffer = DeviceBuffer::filled(runtime.stream()?, 64, 0)?;
    let view = TensorView::from_buffer(&buffer, DType::F16, &[1, 1, 4, 8])?;
    drop(buffer);
    println!("{view:?}");
    Ok(())
}
