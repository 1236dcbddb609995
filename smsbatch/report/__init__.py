"""What a finished run tells its reader."""
