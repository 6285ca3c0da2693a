"""`QuasiNewtonLRController` beside rates that were tuned in hindsight, on problems that it was and was not made on."""
