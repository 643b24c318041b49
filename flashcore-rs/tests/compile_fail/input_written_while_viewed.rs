use flashcore::{Runtime, TensorView, TensorViewMut};

fn main() -> flashcore::Result<()> {
    let mut data = vec![0f32; 32];
    let mut out = vec![0f32; 32];
    let view = TensorView::from_slice(&data, &[1, 1, 4, 8])?;
    data[0] = 1.0;
    Runtime::cpu().attention(&view, &view, &view).run(&mut TensorViewMut::from_slice(&mut out, &[1, 1, 4, 8])?)
}
