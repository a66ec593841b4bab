"""What explicit backward passes give beyond gradients.

The two halves of a backward pass, `Deferred`, `defer` and `gradients`, are below this package, in
`funcnet.deferred` and `funcnet.pullbacks`, since combinators know them. Here is what is made of
them, and beside them:

- ``walkers``: visit the pullback of each leaf layer;
- ``rules``: other backward rules for the same forward pass;
- ``memory``: residuals that are stored in less memory, or computed back;
- ``per_example``: gradients of single examples, their norms, and weighted sums of them;
- ``privacy``: private training, its sampling and its accountant;
- ``layer_by_layer``: updates with one layer's gradients in memory at a time;
- ``curvature``: Kronecker factors and K-FAC;
- ``equations``: fixed points and differential equations as layers;
- ``higher``: derivatives in a direction, and products with the Hessian.
"""
