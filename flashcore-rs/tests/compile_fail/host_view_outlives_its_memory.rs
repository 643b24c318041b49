use flashcore::{Result, TensorView};

fn view<'a>() -> Result<TensorView<'a>> {
    let data = vec![0f32; 32];
    TensorView::from_slice(&data, &[1, 1, 4, 8])
}

fn main() {
    let _ = view();
}
