"""All losses of the zoo."""

from tests.zoo import (
    control,
    flows,
    gans,
    inversion,
    meta,
    pinn,
    potentials,
    scores,
    second_order,
    transport,
)

LOSSES = (
    *pinn.LOSSES,
    *potentials.LOSSES,
    *meta.LOSSES,
    *inversion.LOSSES,
    *gans.LOSSES,
    *flows.LOSSES,
    *scores.LOSSES,
    *control.LOSSES,
    *transport.LOSSES,
    *second_order.LOSSES,
)
