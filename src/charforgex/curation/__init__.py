"""Raw pictures to a manifest. Runs without torch or diffusers."""
