"""Elements of both 16-bit types: random ones with outliers, poison, and how near is near enough."""

import torch

TYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
# Half a unit in the last place, relative.
ROUNDING = {"bf16": 2.0**-8, "f16": 2.0**-11}
# Bits of outputs before a launch, and of inputs that nothing may read: NaN in all types.
POISON_16, POISON_32 = 0x7FEE, 0x7FEE7FEE


class Random:
    """Values that a seed fixes: small ones on the CPU, elements where they are wanted."""

    def __init__(self, place, seed):
        self.device = place.device
        self.generator = torch.Generator().manual_seed(seed)
        self.own = torch.Generator(self.device).manual_seed(seed)

    def uniform(self, *shape):
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def below(self, end, *shape):
        return torch.randint(0, end, shape, generator=self.generator, dtype=torch.int64)

    def elements(self, of, *shape):
        """Mostly within (-2, 2); one in 200 is 50 times that."""
        values, far = (torch.rand(shape, generator=self.own, device=self.device) for _ in range(2))
        values = torch.where(far < 1 / 200, values * 200 - 100, values * 4 - 2)
        return values.to(TYPES[of])


def poisoned(place, of, *shape):
    """`of`: a type's name, or torch's dtype of 32 bits."""
    if of in TYPES:
        return torch.full(shape, POISON_16, dtype=torch.int16, device=place.device).view(TYPES[of])
    words = torch.full(shape, POISON_32, dtype=torch.int32, device=place.device)
    return words.view(of) if of != torch.int32 else words


def is_poison(tensor):
    bits = {2: (torch.int16, POISON_16), 4: (torch.int32, POISON_32)}[tensor.element_size()]
    return bool((tensor.contiguous().view(bits[0]) == bits[1]).all())


def check(holds, what):
    """What is checked here must not depend on how Python was started, as `assert` does."""
    if not holds:
        raise AssertionError(what)


def check_same(what, ours, exact):
    check(ours.shape == exact.shape, f"{what}: {tuple(ours.shape)} for {tuple(exact.shape)}")
    equal = ours == exact
    if not bool(equal.all()):
        at = tuple(int(index) for index in (~equal).nonzero()[0])
        raise AssertionError(f"{what}, element {at}: {ours[at].item()} for {exact[at].item()}")


def check_within(what, ours, exact, most):
    """Each element, NaN not; the largest share of what is allowed that is used."""
    ours, exact = ours.double(), exact.double()
    check(ours.shape == exact.shape, f"{what}: {tuple(ours.shape)} for {tuple(exact.shape)}")
    share = (ours - exact).abs() / most
    if not bool((share <= 1).all()):
        at = tuple(int(index) for index in (~(share <= 1)).nonzero()[0])
        raise AssertionError(f"{what}, element {at}: {ours[at].item()} for {exact[at].item()}")
    return float(share.max()) if share.numel() else 0.0


def check_near(what, of, ours, exact):
    """The exact values rounded, or next to them where sums in f32 differ."""
    return check_within(what, ours, exact, exact.abs() * (ROUNDING[of] + 1e-5) + 1e-7)
