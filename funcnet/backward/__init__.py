"""What explicit backward passes give: deferred gradients, other rules, residuals kept otherwise."""
