const tip = document.getElementById("tip");
function show(event) {
  const target = event.target.closest("[data-tip]");
  tip.style.visibility = target ? "visible" : "hidden";
  if (!target) return;
  tip.textContent = target.dataset.tip;
  const box = tip.getBoundingClientRect();
  const left = Math.min(event.clientX + 14, innerWidth - box.width - 8);
  const below = event.clientY + 18;
  tip.style.left = Math.max(8, left) + "px";
  tip.style.top = (below + box.height > innerHeight ? event.clientY - box.height - 12 : below) + "px";
}
document.addEventListener("pointermove", show);
document.addEventListener("pointerdown", show);
