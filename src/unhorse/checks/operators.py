"""The operators that a file may name: of torch in TorchScript and .pt2, and of ONNX; no others."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


TORCH = _words(
    """
    abs adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d add addcdiv addcmul
    addmm alias amax amin arange argmax argmin as_tensor atan avg_pool1d avg_pool2d baddbmm batch_norm
    bitwise_and bitwise_not bitwise_or bmm broadcast_tensors broadcast_to cat ceil celu channel_shuffle
    chunk clamp clamp_max clamp_min clone concat constant_pad_nd contiguous conv1d conv2d conv3d
    conv_transpose1d conv_transpose2d convolution copy copysign cos cosh cudnn_convolution cumsum detach
    diagonal div divide dropout dropout2d einsum elu embedding empty empty_like eq erf exp expand expand_as
    expm1 eye feature_dropout flatten flip floor floor_divide fmod full full_like gather ge gelu glu
    group_norm gt hardshrink hardsigmoid hardswish hardtanh hstack index index_put index_select
    instance_norm isfinite isinf isnan item layer_norm le leaky_relu lift_fresh_copy linalg_norm
    linalg_vector_norm linear linspace log log10 log1p log2 log_sigmoid log_softmax logical_and logical_not
    logical_or logical_xor logsumexp lt masked_fill matmul max max_pool1d max_pool2d max_pool2d_with_indices
    maximum mean meshgrid min minimum mish mm movedim mul multiply narrow native_batch_norm native_dropout
    native_group_norm native_layer_norm ne neg negative new_empty new_full new_ones new_zeros norm numpy_T
    ones ones_like pad permute pixel_shuffle pixel_unshuffle pow prelu prod reciprocal reflection_pad2d relu
    relu6 remainder repeat repeat_interleave replication_pad2d reshape reshape_as rms_norm roll round rsqrt
    rsub scalar_tensor scaled_dot_product_attention scatter select selu sigmoid sign silu sin sinh slice
    softmax softplus softshrink softsign split split_with_sizes sqrt square squeeze stack std std_mean sub
    subtract sum swapaxes swapdims t tan tanh tensor tensor_split threshold tile to topk transpose tril triu
    true_divide type_as unbind unflatten unfold unsqueeze upsample_bicubic2d upsample_bilinear2d
    upsample_nearest2d var var_mean view view_as vstack where zeros zeros_like alpha_dropout
    feature_alpha_dropout interpolate max_unpool2d lp_pool2d avg_pool3d max_pool3d sym_size sym_numel
    sym_constrain_range_for_size _adaptive_avg_pool2d _assert_scalar _assert_tensor_metadata _convolution
    _convolution_mode _log_softmax _native_batch_norm_legit_no_training _native_multi_head_attention
    _reshape_copy _scaled_dot_product_flash_attention_for_cpu _softmax _to_copy _unsafe_view view_copy
    _shape_as_tensor
    """
)
"""Of torch.ops.aten, without overload and trailing underscore: none reads or writes a file, opens a
connection, runs other code or reinterprets memory (no from_file, save, load, as_strided, set_, resize_)."""

SCRIPT = _words(
    """
    __contains__ __is__ __isnot__ __not__ __and__ __or__ __getitem__ _set_item all any append extend insert
    pop bool device dim dtype floordiv format is_autocast_enabled is_autocast_cpu_enabled is_floating_point
    is_grad_enabled is_complex is_tracing is_scripting jit len list numel range_length requires_grad size
    stride ord str join warn values keys items get copy get_device is_cuda layout type dict ceil floor
    sorted
    """
)
"""What TorchScript writes beside operators on tensors: on lists, strings, numbers, and its warnings."""

PRIM = _words(
    """
    NumToTensor RaiseException device dtype is_nested requires_grad type min max abs layout is_cuda is_cpu
    is_mkldnn is_quantized is_sparse ImplicitTensorToNum shape data grad itemsize isinstance
    """
)
"""Of the namespace prim in TorchScript: no PythonOp, no rpc, no fork."""

ONNX = _words(
    """
    Abs Add And ArgMax ArgMin AveragePool BatchNormalization Cast CastLike Ceil Celu Clip Concat Constant
    ConstantOfShape Conv ConvTranspose Cos CumSum DepthToSpace Div Dropout Einsum Elu Equal Erf Exp Expand
    EyeLike Flatten Floor Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool
    GlobalMaxPool Greater GreaterOrEqual GroupNormalization HardSigmoid HardSwish Hardmax Identity If
    InstanceNormalization IsInf IsNaN LRN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax
    LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg Not OneHot
    Or PRelu Pad Pow RMSNormalization Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp
    ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize Round Scatter
    ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Size Slice Softmax Softplus Softsign
    SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu
    Unsqueeze Upsample Where Xor Attention DequantizeLinear QuantizeLinear
    """
)
"""Of the domain ai.onnx: deterministic and stateless; no loops, sequences, strings or random numbers."""


def is_torch_operator(name: str) -> bool:
    """Whether an operator of aten may stand in a file, in place (`relu_`) or not."""
    return name in TORCH or (name.endswith("_") and not name.startswith("__") and name[:-1] in TORCH)
