"""The same networks in Keras 3 on its torch backend, with the student lab's loader."""

import warnings

from benchmarks.cases import LEARNING_RATE, Case, build, load
from benchmarks.gate import Gate
from benchmarks.rivals import FOREVER


def keras(gate: Gate, case: Case, images: int | None, workers: int, output_dir: str):
    """Compiled and fitted as the guides of Keras do it."""
    warnings.simplefilter("ignore")
    import keras

    from benchmarks.inputs import pil_loaders

    class GateCallback(keras.callbacks.Callback):
        def on_epoch_begin(self, *_):
            gate.begin()

        def on_test_begin(self, *_):
            gate.trained()

        def on_epoch_end(self, *_):  # which follows the validation
            gate.validated()

    data = load(case, images)
    train_loader, validation_loader = pil_loaders(case, data, workers)
    gate.images = len(train_loader.dataset)
    model = keras_model(build(case, data.image_shape, data.num_classes), data.image_shape)
    model.compile(
        optimizer=keras.optimizers.Adam(LEARNING_RATE, epsilon=1e-8),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    _tell_first_step(gate, model.optimizer)
    model.fit(train_loader, validation_data=validation_loader, epochs=FOREVER, callbacks=[GateCallback()], verbose=0)


def keras_model(network, image_shape):
    """A network of lablib.models as a Keras model, with the same weights; channels first, as torch computes."""
    import keras
    import torch
    from torch import nn
    from torchvision.models.resnet import BasicBlock

    from lablib.models import ResidualBlock, ResidualMLP

    layers = keras.layers
    keras.config.set_image_data_format("channels_first")
    copied = []  # (Keras layer, torch layer)

    def translate(module: nn.Module, x):
        """The output of a module for a symbolic tensor."""
        match module:
            case nn.Sequential():
                for part in module:
                    x = translate(part, x)
                return x
            case nn.Linear():
                return copy(layers.Dense(module.out_features, use_bias=module.bias is not None), module)(x)
            case nn.Conv2d():
                size, stride = module.kernel_size, module.stride
                if size[0] > 1 and stride[0] > 1:  # "same" would pad other sides than torch does
                    x = layers.ZeroPadding2D(module.padding)(x)
                padding = "same" if stride[0] == 1 else "valid"
                return copy(layers.Conv2D(module.out_channels, size, stride, padding, use_bias=False), module)(x)
            case nn.BatchNorm2d():
                return copy(layers.BatchNormalization(axis=1, momentum=0.9, epsilon=module.eps), module)(x)
            case nn.ReLU():
                return layers.ReLU()(x)
            case nn.Dropout():
                return layers.Dropout(module.p)(x)
            case nn.Identity():
                return x
            case ResidualBlock():
                return layers.Add()([translate(module.residual, x), translate(module.projection, x)])
            case BasicBlock():
                path = nn.Sequential(module.conv1, module.bn1, module.relu, module.conv2, module.bn2)
                shortcut = translate(module.downsample, x) if module.downsample is not None else x
                return layers.ReLU()(layers.Add()([translate(path, x), shortcut]))
        raise TypeError(f"no Keras layer is known for {type(module).__name__}")

    def copy(layer, module: nn.Module):
        copied.append((layer, module))
        return layer

    images = keras.Input(image_shape)
    if hasattr(network, "stem"):
        x = layers.GlobalAveragePooling2D()(translate(network.stages, translate(network.stem, images)))
    else:
        x = layers.Reshape((-1,))(images)
        if isinstance(network, ResidualMLP):
            for block in network.blocks:
                x = layers.ReLU()(translate(block, x))
        else:
            x = translate(network.hidden, x)
    model = keras.Model(images, translate(network.classifier, x))
    with torch.no_grad():
        for layer, module in copied:
            layer.set_weights(_keras_weights(module))
    return model


def _keras_weights(module) -> list:
    """A torch layer's weights in the order and shape of its Keras layer."""
    from torch import nn

    if isinstance(module, nn.BatchNorm2d):
        tensors = [module.weight, module.bias, module.running_mean, module.running_var]
    elif isinstance(module, nn.Conv2d):
        tensors = [module.weight.permute(2, 3, 1, 0)]
    else:
        tensors = [module.weight.T, *([module.bias] if module.bias is not None else [])]
    return [tensor.detach().numpy() for tensor in tensors]


def _tell_first_step(gate: Gate, optimizer):
    apply = optimizer.apply

    def told(*arguments, **more):
        result = apply(*arguments, **more)
        optimizer.apply = apply
        gate.first_step()
        return result

    optimizer.apply = told
