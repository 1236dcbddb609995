document.documentElement.classList.add("js");
document.addEventListener("input", ({ target }) => target.parentElement.style.setProperty("--x", target.value + "%"));
