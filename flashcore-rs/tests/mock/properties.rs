//! Over shapes, strides, alignments, masks and options: checks never panic, kernels stay inside the tensors, and outputs
//! are those of the CPU backend.

use std::sync::Arc;

use flashcore::testing::MockDriver;
use flashcore::{AttentionOptions, CausalAlign, DType, Error, Layout, Runtime, TensorView, Window};
use proptest::prelude::*;

use crate::support::{Call, Form, Operand, assert_sound, cases, mock, split_keys, with_bundle};

/// Numbers where arithmetic goes wrong.
fn edge() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..9u64,
        (0..64u32, -2..3i64).prop_map(|(shift, offset)| (1u64 << shift).wrapping_add_signed(offset)),
        any::<u64>(),
    ]
}

fn form() -> impl Strategy<Value = Form> {
    let orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
    let form = |(order, padding, offset)| Form { order, padding, offset };
    prop_oneof![
        (Just([0, 1, 2]), Just(0), Just(0)).prop_map(form),
        (prop::sample::select(orders.to_vec()), prop::sample::select(vec![0, 8, 3]), 0..9usize).prop_map(form),
    ]
}

fn options() -> impl Strategy<Value = AttentionOptions> {
    let side = || prop::option::of(prop_oneof![0..12u32, any::<u32>()]);
    let window = prop::option::of((side(), side()).prop_map(|(left, right)| Window { left, right }));
    let align = prop_oneof![Just(CausalAlign::TopLeft), Just(CausalAlign::BottomRight)];
    let scale = prop::option::of(-2f32..2f32);
    (any::<bool>(), align, window, scale).prop_map(|(causal, causal_align, window, scale)| AttentionOptions {
        causal,
        causal_align,
        window,
        scale,
    })
}

prop_compose! {
    fn call()(
        bf16 in any::<bool>(),
        sizes in (1..3usize, 1..3usize, 1..4usize, 0..80usize, 0..70usize),
        dims in (prop_oneof![1..20usize, Just(32), Just(64)], 1..20usize, any::<bool>()),
        forms in [form(), form(), form(), form()],
        mask in prop::option::of((0..3usize, [any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>()], form())),
        lse in any::<bool>(),
        options in options(),
        seed in any::<u64>(),
    ) -> Call {
        let dtype = if bf16 { DType::BF16 } else { DType::F16 };
        let (batch, heads_kv, group, seq_q, seq_k) = sizes;
        let (dim_qk, dim_v, same) = dims;
        let dim_v = if same { dim_qk } else { dim_v };
        let [q, k, v, out] = [
            [batch, heads_kv * group, seq_q, dim_qk],
            [batch, heads_kv, seq_k, dim_qk],
            [batch, heads_kv, seq_k, dim_v],
            [batch, heads_kv * group, seq_q, dim_v],
        ];
        let mut call = Call::new(dtype, q, k, dim_v);
        call.query = Operand::new(dtype, q, forms[0], seed);
        call.key = Operand::new(dtype, k, forms[1], seed ^ 1);
        call.value = Operand::new(dtype, v, forms[2], seed ^ 2);
        call.out = Operand::new(dtype, out, forms[3], 0).poison();
        call.options = options;
        call.attn_mask = mask.map(|(kind, broadcast, form)| {
            let full = [batch, heads_kv * group, seq_q, seq_k];
            let shape = std::array::from_fn(|d| if broadcast[d] { 1 } else { full[d] });
            // The last dimension of a mask need not be contiguous.
            let form = Form { padding: if shape[3] == 0 { 0 } else { form.padding }, ..form };
            Operand::new([DType::Bool, DType::F32, dtype][kind], shape, form, seed ^ 3)
        });
        if lse { call.with_lse() } else { call }
    }
}

proptest! {
    #![proptest_config(cases(400))]

    #[test]
    fn outputs_are_those_of_the_cpu(call in call()) {
        let (driver, runtime) = mock();
        call.assert_same(&runtime);
        assert_sound(&driver);
    }

    #[test]
    fn split_keys_give_the_same(call in call()) {
        let driver = Arc::new(MockDriver::default());
        let runtime = with_bundle(&driver, Runtime::builder(), split_keys()).expect("a runtime");
        call.assert_same(&runtime);
        assert_sound(&driver);
    }
}

proptest! {
    #![proptest_config(cases(4000))]

    #[test]
    fn layouts_of_anything_are_judged(shape in [edge(), edge(), edge(), edge()], strides in [edge(), edge(), edge(), edge()]) {
        let shape = shape.map(|n| n as usize);
        let strides = strides.map(|n| n as i64);
        if let Ok(layout) = Layout::new("tensor", DType::F64, &shape, &strides) {
            let last: u128 = shape.iter().zip(strides).map(|(&n, stride)| (n.max(1) as u128 - 1) * stride as u128).sum();
            let extent = if shape.contains(&0) { 0 } else { last + 1 };
            prop_assert_eq!(layout.extent() as u128, extent);
            prop_assert!(extent * 8 <= i64::MAX as u128);
            prop_assert_eq!(layout.is_empty(), shape.contains(&0));
        }
        let _ = Layout::contiguous("tensor", DType::F16, &shape);
        let data = [0f32; 64];
        if let Ok(view) = TensorView::from_slice_strided(&data, &shape, &strides) {
            prop_assert!(view.layout().extent() <= 64);
        }
    }

    #[test]
    fn calls_of_any_shape_are_answered(
        shapes in [[edge(), edge(), edge(), edge()], [edge(), edge(), edge(), edge()], [edge(), edge(), edge(), edge()]],
        zero_strides in any::<bool>(),
        options in options(),
    ) {
        // Views of one row with strides of 0 can have any size; most such calls are refused, all of them politely.
        let data = [half::f16::ONE; 512];
        let strides = if zero_strides { [0, 0, 0, 1] } else { [256, 64, 8, 1] };
        let view = |shape: [u64; 4]| TensorView::from_slice_strided(&data, &shape.map(|n| n as usize), &strides);
        let [Ok(query), Ok(key), Ok(value)] = shapes.map(view) else { return Ok(()) };
        let cpu = flashcore::Runtime::cpu();
        let explained = cpu.attention(&query, &key, &value).options(options).explain();
        match explained {
            Ok(explanation) => prop_assert!(!explanation.to_string().is_empty()),
            Err(error) => prop_assert!(matches!(error, Error::InvalidArgument { .. }), "{error}"),
        }
    }
}
