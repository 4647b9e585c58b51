"""Use one operation in a PyTorch program: the language-model loss that never holds the logits.

    python examples/use_an_operation.py

A GPU is used where there is one. Elsewhere the same call runs PyTorch code, with the same arguments and gradients.
"""

import torch

from phi1.kernels import backend, linear_cross_entropy

ROWS, WIDTH, VOCAB = 1024, 256, 8192  # N tokens, D, V


def loss_and_gradients(x, weight, bias, targets):
    """Return the loss and the gradients of x, weight and bias."""
    loss = linear_cross_entropy(x, weight, bias, targets)  # head, softmax and loss in one call, in chunks of rows
    return loss, torch.autograd.grad(loss, (x, weight, bias))


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator(device).manual_seed(0)
    x = torch.randn(ROWS, WIDTH, device=device, generator=draw).requires_grad_()
    weight = (0.02 * torch.randn(VOCAB, WIDTH, device=device, generator=draw)).requires_grad_()
    bias = torch.zeros(VOCAB, device=device, requires_grad=True)
    targets = torch.randint(VOCAB, (ROWS,), device=device, generator=draw)

    loss, grads = loss_and_gradients(x, weight, bias, targets)
    print(f"device {device}, loss {loss.item():.6f}")

    # Each operation has a specification in plain PyTorch, which runs on any device.
    with backend("reference"):
        expected, expected_grads = loss_and_gradients(x, weight, bias, targets)
    torch.testing.assert_close(loss, expected)
    for name, grad, wanted in zip(("x", "weight", "bias"), grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted)
        print(f"d{name} {list(grad.shape)}: largest difference from the reference {(grad - wanted).abs().max():.1e}")


if __name__ == "__main__":
    main()
