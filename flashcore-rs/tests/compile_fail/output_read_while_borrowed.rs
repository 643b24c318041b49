use flashcore::{DType, DeviceBuffer, Runtime, TensorView, TensorViewMut};

fn main() -> flashcore::Result<()> {
    let runtime = Runtime::cuda(0)?;
    let input = DeviceBuffer::filled(runtime.stream()?, 64, 0)?;
    let mut buffer = DeviceBuffer::filled(runtime.stream()?, 64, 0)?;
    let view = TensorView::from_buffer(&input, DType::F16, &[1, 1, 4, 8])?;
    let mut out = TensorViewMut::from_buffer(&mut buffer, DType::F16, &[1, 1, 4, 8])?;
    let early = buffer.to_vec::<u8>()?;
    runtime.attention(&view, &view, &view).run(&mut out)?;
    println!("{early:?}");
    Ok(())
}
