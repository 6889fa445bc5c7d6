"""What a Keras configuration may name: layers, models, parts, modules, activations; all else is refused."""

from __future__ import annotations

LAYERS = {
    *(
        "InputLayer",
        "Dense",
        "EinsumDense",
        "Conv2D",
        "Conv2DTranspose",
        "DepthwiseConv2D",
        "SeparableConv2D",
    ),
    *("Convolution2D", "Conv1D", "DepthwiseConv1D", "SeparableConv1D", "Flatten", "Reshape", "Permute"),
    *("RepeatVector", "Activation", "ReLU", "LeakyReLU", "PReLU", "ELU", "Softmax", "BatchNormalization"),
    *("LayerNormalization", "GroupNormalization", "UnitNormalization", "RMSNormalization", "Normalization"),
    *("Dropout", "SpatialDropout2D", "SpatialDropout1D", "AlphaDropout", "GaussianDropout", "GaussianNoise"),
    *("MaxPooling2D", "AveragePooling2D", "GlobalMaxPooling2D", "GlobalAveragePooling2D", "MaxPooling1D"),
    *("AveragePooling1D", "GlobalMaxPooling1D", "GlobalAveragePooling1D", "AdaptiveAveragePooling2D"),
    *("MaxPool2D", "AvgPool2D", "GlobalAvgPool2D", "GlobalMaxPool2D", "ZeroPadding2D", "Cropping2D"),
    *("UpSampling2D", "Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum", "Concatenate", "Dot"),
    *("Rescaling", "Resizing", "CenterCrop", "RandomFlip", "RandomRotation", "RandomZoom", "RandomCrop"),
    *("RandomTranslation", "RandomContrast", "RandomBrightness", "Identity", "ActivityRegularization"),
    *("MultiHeadAttention", "Embedding"),
}
MODELS = {"Functional", "Sequential", "Model"}
PARTS = {
    *(
        "DTypePolicy",
        "Policy",
        "__keras_tensor__",
        "__tuple__",
        "TensorShape",
        "GlorotUniform",
        "GlorotNormal",
    ),
    *("HeNormal", "HeUniform", "LecunNormal", "LecunUniform", "Zeros", "Ones", "Constant", "RandomNormal"),
    *(
        "RandomUniform",
        "TruncatedNormal",
        "VarianceScaling",
        "Orthogonal",
        "OrthogonalInitializer",
        "L1",
        "L2",
    ),
    *("L1L2", "MaxNorm", "MinMaxNorm", "NonNeg", "UnitNorm", "SeedGenerator"),
}
CLASSES = LAYERS | MODELS | PARTS
MODULES = {
    *(None, "keras", "keras.layers", "keras.models", "keras.initializers", "keras.regularizers"),
    *(
        "keras.constraints",
        "keras.random",
        "keras.dtype_policies",
        "keras.mixed_precision",
        "keras.src.models",
    ),
    *(
        "keras.src.models.functional",
        "keras.src.models.sequential",
        "keras.src.models.model",
        "keras.activations",
    ),
    *("keras.engine.functional", "keras.engine.sequential", "keras.src.engine.functional"),
    *("keras.src.engine.sequential", "keras.saving"),
}
COMPILED = ("keras.optimizers", "keras.losses", "keras.metrics")
ACTIVATIONS = {
    *(
        "linear",
        "relu",
        "relu6",
        "leaky_relu",
        "elu",
        "selu",
        "gelu",
        "celu",
        "silu",
        "swish",
        "mish",
        "sigmoid",
    ),
    *("hard_sigmoid", "hard_silu", "hard_swish", "hard_tanh", "tanh", "softmax", "log_softmax", "softplus"),
    *("softsign", "soft_shrink", "hard_shrink", "tanh_shrink", "exponential", "squareplus", "log_sigmoid"),
    "sparse_plus",
}
UNREAD_LISTED = """
LSTM GRU SimpleRNN RNN LSTMCell GRUCell SimpleRNNCell StackedRNNCells Bidirectional TimeDistributed ConvLSTM1D
ConvLSTM2D ConvLSTM3D Conv3D Conv3DTranspose Conv1DTranspose MaxPooling3D AveragePooling3D GlobalMaxPooling3D
GlobalAveragePooling3D MaxPool1D MaxPool3D UpSampling1D UpSampling3D ZeroPadding1D ZeroPadding3D Cropping1D
Cropping3D Masking Attention AdditiveAttention GroupQueryAttention GroupedQueryAttention SpatialDropout3D
SpectralNormalization Discretization Hashing CategoryEncoding HashedCrossing LocallyConnected1D
LocallyConnected2D ThresholdedReLU RandomHeight RandomWidth RandomErasing RandomGrayscale RandomHue
RandomSaturation RandomSharpness RandomPosterization RandomShear RandomPerspective RandomElasticTransform
RandomGaussianBlur RandomColorJitter RandomColorDegeneration RandomInvert RandAugment AugMix CutMix MixUp
AutoContrast Equalization Solarization STFTSpectrogram MelSpectrogram TFOpLambda SlicingOpLambda
"""
UNREAD = frozenset(UNREAD_LISTED.split())
"""Layers of Keras itself that run no code of others and are not read: for sequences, volumes, augmentation;
operations of TensorFlow that Keras 2 names."""
