"""All losses of the zoo."""

from tests.zoo import gans, inversion, meta, pinn, potentials

LOSSES = (*pinn.LOSSES, *potentials.LOSSES, *meta.LOSSES, *inversion.LOSSES, *gans.LOSSES)
